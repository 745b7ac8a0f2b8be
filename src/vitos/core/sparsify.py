"""From boxes to a sparse set of visual tokens: which are kept, and what becomes of the rest.

docs/method.md, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from vitos.core.geometry import BoolArray, Box, TokenGrid

FusionMode = Literal["none", "mean", "weighted"]


@dataclass(frozen=True, slots=True)
class KeepRule:
    """Which visual tokens a set of boxes keeps (ours).

    Attributes:
        margin: number of cells by which each box is widened on all sides.
        min_tokens: smallest number of tokens to keep of an image with a box; the cells nearest to it make it up.
        other_images: number of tokens to keep of an image without a box, if another image has one: those nearest to
            its centre. With 0 only the image's number in the prompt remains.
    """

    margin: int = 0
    min_tokens: int = 1
    other_images: int = 0

    def __post_init__(self) -> None:
        if self.margin < 0 or self.min_tokens < 1:
            raise ValueError(f"margin must be >= 0 and min_tokens >= 1, got {self}")
        if self.other_images < 0:
            raise ValueError(f"other_images must be >= 0, got {self}")


@dataclass(frozen=True, slots=True)
class Fusion:
    """How outside tokens enter the kept ones: `none`, `mean`, or `weighted` with strength `beta` in 0..1."""

    mode: FusionMode = "weighted"
    beta: float = 0.15

    def __post_init__(self) -> None:
        if self.mode not in ("none", "mean", "weighted"):
            raise ValueError(f"fusion mode must be none, mean or weighted, got {self.mode!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"fusion beta must be in 0..1, got {self.beta}")


@dataclass(frozen=True, slots=True)
class Kept:
    """The visual tokens of a question's images that the reasoning branch answers from.

    Attributes:
        grid: the cell that each token looks at, image by image.
        mask: True at kept tokens, bool, shape (num_tokens,), at least one True.
        why_not: reason why the boxes could not be followed, and what was done instead; always counted, never hidden.
            Empty if the boxes were followed.
        scores: score of each token by which it was kept or dropped, shape (num_tokens,); None if boxes decided.
    """

    grid: TokenGrid
    mask: BoolArray
    why_not: str = ""
    scores: NDArray[np.float32] | None = None

    @classmethod
    def everything(cls, grid: TokenGrid, why_not: str = "") -> Kept:
        """All tokens."""
        return cls(grid, np.ones(grid.num_tokens, dtype=bool), why_not)

    @property
    def fallback(self) -> bool:
        """Whether the boxes could not be followed."""
        return bool(self.why_not)

    @property
    def all(self) -> bool:
        """Whether no token is dropped."""
        return bool(self.mask.all())

    @property
    def count(self) -> int:
        """Number of tokens kept."""
        return int(self.mask.sum())

    @property
    def ratio(self) -> float:
        """Share of the visual tokens that are kept, in (0, 1]."""
        return float(self.mask.mean())

    @property
    def images(self) -> list[Kept]:
        """The kept tokens of each image; an image may have none."""
        return [Kept(grid, mask) for grid, mask in zip(self.grid.images, self.grid.split(self.mask), strict=True)]


NO_BOX = "no box could be read; the whole image was used"


def select(grid: TokenGrid, boxes: Sequence[Box], rule: KeepRule = KeepRule()) -> Kept:
    """Keep the tokens whose cells overlap a box; without any box, the whole image (a counted fallback).

    >>> select(TokenGrid.single(2, 2), [Box(0.6, 0, 0.9, 0.3)]).mask
    array([False,  True, False, False])

    A box that overlaps no cell, as on the seam of a tiled model that drops a border, keeps the nearest `min_tokens`.
    Of several images each keeps tokens by its own boxes; one without a box keeps `other_images`.
    """
    if not boxes:
        return Kept.everything(grid, NO_BOX)
    return Kept(grid, np.concatenate([_selected(one, own, rule) for one, own in grid.by_image(boxes)]))


def _selected(grid: TokenGrid, boxes: Sequence[Box], rule: KeepRule) -> BoolArray:
    """The kept tokens of one image."""
    mask = grid.overlapping(boxes, rule.margin)
    missing = min(rule.min_tokens if boxes else rule.other_images, grid.num_tokens) - int(mask.sum())
    if missing > 0:
        distance = np.where(mask, np.inf, distance_to_boxes(grid, boxes) if boxes else distance_to_centre(grid))
        mask[np.argsort(distance, kind="stable")[:missing]] = True
    return mask


def distance_to_boxes(grid: TokenGrid, boxes: Sequence[Box]) -> np.ndarray:
    """Distance from each cell's centre to the nearest box, in image fractions, shape (num_tokens,); 0 inside a box.

    Of several images, only boxes in the cell's own image count; inf where that has none.
    """
    if grid.parts:
        return np.concatenate([distance_to_boxes(one, own) for one, own in grid.by_image(boxes)])
    if not boxes:
        return np.full(grid.num_tokens, np.inf)
    centres = grid.centres()
    low = np.array([(b.x1, b.y1) for b in boxes])[:, None]
    high = np.array([(b.x2, b.y2) for b in boxes])[:, None]
    outside = np.maximum(np.maximum(low - centres, centres - high), 0)
    nearest: np.ndarray = np.hypot(outside[..., 0], outside[..., 1]).min(0)
    return nearest


def distance_to_centre(grid: TokenGrid) -> np.ndarray:
    """Distance from each cell's centre to that of what is shown of its image, shape (num_tokens,), to nine digits."""
    parts = []
    for one in grid.images:
        x1, y1, x2, y2 = one.shown.as_tuple()
        offsets = one.centres() - np.array([(x1 + x2) / 2, (y1 + y2) / 2])
        parts.append(np.round(np.hypot(offsets[:, 0], offsets[:, 1]), 9))
    return np.concatenate(parts)


def cell_rectangles(grid: TokenGrid, mask: BoolArray) -> list[tuple[int, int, int, int]]:
    """Rectangles of cells that contain all of `mask`, share no edge or corner, and have the fewest cells in all.

    Args:
        grid: a grid with one view.
        mask: the cells to contain, bool, shape (num_tokens,).

    Returns:
        (top, left, bottom, right) of each rectangle, ends not included.
    """
    (view,) = grid.views
    cells = mask.reshape(view.rows, view.cols)
    while True:
        pieces, _ = ndimage.label(cells, structure=np.ones((3, 3)))
        places = ndimage.find_objects(pieces)
        filled = cells.copy()
        for place in places:
            filled[place] = True
        if (filled == cells).all():
            return [(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in places]
        cells = filled


def best_cells(grid: TokenGrid, scores: NDArray[np.float32], count: int) -> Kept:
    """The `count` tokens of highest score; of equal ones the first.

    >>> best_cells(TokenGrid.single(1, 3), np.array([0.1, 0.9, 0.5], dtype=np.float32), 2).mask
    array([False,  True,  True])

    Raises:
        ValueError: if the scores do not fit the grid, are not finite, or `count` is not in 1..num_tokens.
    """
    if scores.shape != (grid.num_tokens,) or not np.isfinite(scores).all() or not 1 <= count <= grid.num_tokens:
        raise ValueError(
            f"cannot keep {count} of {grid.num_tokens} visual tokens by scores of shape {scores.shape}, which must be "
            "finite numbers, one for each token"
        )
    mask = np.zeros(grid.num_tokens, dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return Kept(grid, mask, scores=scores)


def rectangles(kept: Kept) -> tuple[Box, ...]:
    """Boxes around the kept cells, view by view: the fewest cells that make separate rectangles; in the shown image.

    >>> rectangles(best_cells(TokenGrid.single(2, 2), np.array([0, 2, 0, 1], dtype=np.float32), 2))
    (Box(x1=0.5, y1=0.0, x2=1.0, y2=1.0, image=1),)
    """
    if kept.grid.parts:
        found = enumerate(map(rectangles, kept.images), start=1)
        return tuple(replace(box, image=place) for place, boxes in found for box in boxes)
    out, start, shown = [], 0, kept.grid.shown
    for view in kept.grid.views:
        cells = kept.mask[start : start + view.num_tokens]
        start += view.num_tokens
        x, y = view.edges()
        for top, left, bottom, right in cell_rectangles(TokenGrid((view,)), cells):
            x1, y1, x2, y2 = (
                max(x[left], shown.x1),
                max(y[top], shown.y1),
                min(x[right], shown.x2),
                min(y[bottom], shown.y2),
            )
            if x1 < x2 and y1 < y2:  # a cell of padding shows nothing
                out.append(Box(float(x1), float(y1), float(x2), float(y2)))
    return tuple(dict.fromkeys(out))


def fusion_matrix(tokens: Tensor, mask: Tensor, fusion: Fusion = Fusion()) -> Tensor:
    """Mixing weights that turn all tokens of an image into the kept ones; each row sums to 1.

    Each outside token d is assigned to the kept token k of highest cosine similarity. With S_k the tokens assigned to
    k, the new token is

    - `mean`: k' = (k + Σ d) / (1 + |S_k|)
    - `weighted`: k' = (1 − β) k + β Σ w_d d / Σ w_d with w_d = max(cos(d, k), 0); k' = k where Σ w_d = 0.

    Args:
        tokens: visual embeddings as the language model would see them, shape (N, hidden).
        mask: True at the kept tokens, bool, shape (N,), n of them True.
        fusion: mode and strength.

    Returns:
        The weights, float32, shape (n, N), on the tokens' device. Multiply each visual stream by them.
    """
    _check_mask(tokens, mask)
    kept, outside = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]  # (n,), (N - n,)
    rows = torch.arange(len(kept), device=tokens.device)
    matrix = torch.zeros(len(kept), len(tokens), device=tokens.device)  # (n, N)
    matrix[rows, kept] = 1.0
    if fusion.mode == "none" or len(outside) == 0:
        return matrix
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    cosine, owner = (unit[outside] @ unit[kept].T).max(-1)  # (N - n,), (N - n,)
    weight = torch.ones_like(cosine) if fusion.mode == "mean" else cosine.clamp(min=0)
    matrix[owner, outside] = weight
    absorbed = matrix.sum(-1, keepdim=True) - 1  # (n, 1): Σ w_d of each row
    if fusion.mode == "mean":
        return matrix / (1 + absorbed)
    share = torch.where(absorbed > 0, fusion.beta / absorbed.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    matrix = matrix * share
    matrix[rows, kept] = torch.where(absorbed[:, 0] > 0, 1.0 - fusion.beta, 1.0)
    return matrix


def fuse(streams: Sequence[Tensor], mask: Tensor, fusion: Fusion = Fusion()) -> tuple[Tensor, ...]:
    """The kept tokens of each visual stream, with the outside ones fused in.

    Args:
        streams: the embeddings (N, hidden), which decide which token is fused into which, then any extra visual
            streams.
        mask: True at the kept tokens, bool, shape (N,), n of them True.
        fusion: mode and strength.

    Returns:
        One (n, hidden) tensor per stream, in its dtype; exactly the kept rows if nothing is fused.
    """
    _check_mask(streams[0], mask)
    if fusion.mode == "none" or bool(mask.all()):
        return tuple(stream[mask] for stream in streams)
    matrix = fusion_matrix(streams[0], mask, fusion)
    return tuple((matrix @ stream.float()).to(stream.dtype) for stream in streams)


def _check_mask(tokens: Tensor, mask: Tensor) -> None:
    if mask.shape != tokens.shape[:1]:
        raise ValueError(f"the keep mask has shape {tuple(mask.shape)} for {tokens.shape[0]} visual tokens")
    if not bool(mask.any()):
        raise ValueError("no visual token is kept; use the dense image instead")
