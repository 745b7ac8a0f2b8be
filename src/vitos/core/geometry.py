"""Boxes of an image and the cells of its visual tokens.

One coordinate convention for the whole package: a `Box` is in fractions (0..1) of the *original* image, x to the
right, y down. Pixels of a resized image, per-mille and padded squares exist only inside one backbone.

A backbone lays its visual tokens over the image as an ordered list of `View`s (docs/method.md, section 1): Qwen2.5-VL
has one view of the whole image; LLaVA one view of the padded square, whose rectangle reaches outside 0..1; tiled
models a thumbnail and one view per tile. `TokenGrid` is that list, its tokens numbered view by view, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BoolArray = NDArray[np.bool_]

EDGE_TOLERANCE = 1e-5
"""How far an edge may lie outside of the image before it is an error: what float32 and five decimals leave."""


@dataclass(frozen=True, slots=True)
class Rect:
    """An axis-parallel rectangle in fractions of the original image; it may reach outside 0..1.

    Raises:
        ValueError: if a coordinate is not finite, or the rectangle has no area.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in self.as_tuple()):
            raise ValueError(f"coordinates must be finite, got {self.as_tuple()}")
        if not (self.x1 < self.x2 and self.y1 < self.y2):
            raise ValueError(f"a rectangle needs x1 < x2 and y1 < y2, got {self.as_tuple()}")

    def as_tuple(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2)."""
        return (self.x1, self.y1, self.x2, self.y2)

    @property
    def area(self) -> float:
        """Share of the image's area, > 0 (a width or height may be subnormal, its product then 0)."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


@dataclass(frozen=True, slots=True)
class Box(Rect):
    """Evidence: a rectangle inside an image, 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, and which image that is.

    >>> left, middle = Box(0, 0, 0.5, 1), Box(0.25, 0, 0.75, 1)
    >>> left.area, round(left.iou(middle), 3)
    (0.5, 0.333)
    >>> left.iou(Box(0, 0, 0.5, 1, image=2))
    0.0

    Attributes:
        image: place of its image among those of the question, from 1.

    Raises:
        ValueError: if it is inverted, empty, not finite or reaches outside 0..1, or `image` is below 1.
    """

    image: int = 1

    def __post_init__(self) -> None:
        # Not super().__post_init__(): slots=True makes a new class, for which zero-argument super() fails.
        Rect.__post_init__(self)
        if min(self.as_tuple()) < 0 or max(self.as_tuple()) > 1:
            raise ValueError(f"a box must lie in 0..1 of the image, got {self.as_tuple()}")
        if self.image < 1:
            raise ValueError(f"images are counted from 1, got a box in image {self.image}")

    @classmethod
    def snapped(cls, x1: float, y1: float, x2: float, y2: float, image: int = 1) -> Box:
        """A box whose edges may miss 0..1 by what rounding does to a fraction (1e-5), put onto the image's edge.

        Raises:
            ValueError: as for `Box`.

        >>> Box.snapped(-1e-9, 0, 1.0000001, 0.5)
        Box(x1=0.0, y1=0, x2=1.0, y2=0.5, image=1)
        """
        x1, y1, x2, y2 = (
            0.0 if -EDGE_TOLERANCE <= v < 0 else 1.0 if 1 < v <= 1 + EDGE_TOLERANCE else v for v in (x1, y1, x2, y2)
        )
        return cls(x1, y1, x2, y2, image)

    def iou(self, other: Box) -> float:
        """Intersection over union with another box, 0..1; 0 for a box in another image."""
        if self.image != other.image:
            return 0.0
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        if width <= 0 or height <= 0:
            return 0.0
        intersection = width * height
        union = self.area + other.area - intersection
        return intersection / union if union > 0 else 0.0

    def to_json(self) -> Any:
        """`[x1, y1, x2, y2]` in the first image, otherwise `{"image": 2, "box": [x1, y1, x2, y2]}`, as in records."""
        edges = list(self.as_tuple())
        return edges if self.image == 1 else {"image": self.image, "box": edges}

    @classmethod
    def from_json(cls, value: Any) -> Box:
        """The inverse of `to_json`.

        >>> Box.from_json(Box(0, 0, 0.5, 1, image=2).to_json())
        Box(x1=0, y1=0, x2=0.5, y2=1, image=2)
        """
        (x1, y1, x2, y2), image = (value["box"], value["image"]) if isinstance(value, dict) else (value, 1)
        return cls(x1, y1, x2, y2, image)


WHOLE_IMAGE = Rect(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class View:
    """One rectangle of the image and the `rows` x `cols` visual tokens that see it, row by row."""

    rect: Rect
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a view needs at least one row and one column, got {self.rows} x {self.cols}")

    @property
    def num_tokens(self) -> int:
        return self.rows * self.cols

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Edges of the cells in image fractions: x, shape (cols + 1,), and y, shape (rows + 1,)."""
        r = self.rect
        return (
            r.x1 + (r.x2 - r.x1) * np.arange(self.cols + 1) / self.cols,
            r.y1 + (r.y2 - r.y1) * np.arange(self.rows + 1) / self.rows,
        )

    def overlapping(self, box: Box, margin: int = 0) -> BoolArray:
        """Cells that overlap `box` by a positive area, widened by `margin` cells; shape (rows, cols)."""
        x, y = self.edges()
        cols = (x[:-1] < box.x2) & (x[1:] > box.x1)
        rows = (y[:-1] < box.y2) & (y[1:] > box.y1)
        return np.outer(_widen(rows, margin), _widen(cols, margin))

    def cell_boxes(self) -> list[Rect]:
        """The rectangle of each cell, in token order."""
        x, y = self.edges()
        return [Rect(x[c], y[r], x[c + 1], y[r + 1]) for r in range(self.rows) for c in range(self.cols)]


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """All visual tokens of one image, or of all images of a question.

    Attributes:
        views: the views, in the order of the tokens.
        shown: the part of the image that the encoder was given, smaller than the whole if the image was cropped. Cells
            outside of it look at padding, even where the image goes on. Of several images, that of the first.
        parts: the grids of several images; empty for the grid of one image.
    """

    views: tuple[View, ...]
    shown: Rect = WHOLE_IMAGE
    parts: tuple[TokenGrid, ...] = ()

    @classmethod
    def single(cls, rows: int, cols: int, rect: Rect = WHOLE_IMAGE) -> TokenGrid:
        """A grid of one view, by default of the whole image."""
        return cls((View(rect, rows, cols),))

    @classmethod
    def joined(cls, grids: Sequence[TokenGrid]) -> TokenGrid:
        """The tokens of several images, image by image; of one image its own grid.

        >>> pair = TokenGrid.joined([TokenGrid.single(1, 2), TokenGrid.single(2, 2)])
        >>> pair.overlapping([Box(0, 0, 0.5, 0.5, image=2)]).nonzero()[0]
        array([2])
        """
        if len(grids) == 1:
            return grids[0]
        return cls(tuple(view for grid in grids for view in grid.views), grids[0].shown, tuple(grids))

    @property
    def images(self) -> tuple[TokenGrid, ...]:
        """The grid of each image."""
        return self.parts or (self,)

    def split(self, mask: NDArray[Any]) -> list[NDArray[Any]]:
        """Values of all tokens, shape (num_tokens, ...), image by image."""
        return np.split(mask, np.cumsum([grid.num_tokens for grid in self.images])[:-1])

    def by_image(self, boxes: Iterable[Box]) -> list[tuple[TokenGrid, list[Box]]]:
        """The grid of each image with the boxes in it; the grid of one image gets all boxes."""
        boxes = list(boxes)
        if not self.parts:
            return [(self, boxes)]
        return [(grid, [box for box in boxes if box.image == n]) for n, grid in enumerate(self.parts, start=1)]

    def within(self, crop: Rect) -> TokenGrid:
        """The grid of a cropped picture, laid over the image that it was cut from; `crop` is the cropped rectangle."""
        views = tuple(View(Rect(*_placed(view.rect, crop)), view.rows, view.cols) for view in self.views)
        return TokenGrid(views, Rect(*_placed(self.shown, crop)))

    @property
    def num_tokens(self) -> int:
        return sum(view.num_tokens for view in self.views)

    def overlapping(self, boxes: Iterable[Box], margin: int = 0) -> BoolArray:
        """Tokens whose cell overlaps any of `boxes` by a positive area, shape (num_tokens,).

        A box that only touches a cell's edge does not keep it. `margin` widens each box by that many cells.
        """
        if self.parts:
            return np.concatenate([grid.overlapping(own, margin) for grid, own in self.by_image(boxes)])
        mask = np.zeros(self.num_tokens, dtype=bool)
        for box in boxes:
            if (visible := cut(box, self.shown)) is not None:
                mask |= np.concatenate([view.overlapping(visible, margin).ravel() for view in self.views])
        return mask

    def centres(self) -> NDArray[np.float64]:
        """Centre (x, y) of each cell in image fractions, shape (num_tokens, 2)."""
        return np.array(
            [((r.x1 + r.x2) / 2, (r.y1 + r.y2) / 2) for view in self.views for r in view.cell_boxes()],
            dtype=np.float64,
        )


def enclosing(rects: Sequence[Rect]) -> Rect:
    """The smallest rectangle that holds all of `rects`."""
    corners = np.array([rect.as_tuple() for rect in rects])
    return Rect(*map(float, (*corners[:, :2].min(0), *corners[:, 2:].max(0))))


def touched_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The pixels of an image that a box covers at least in part: left, top, right, bottom, ends not included."""
    tiny = 1e-6  # rounding error of a decimal fraction, in pixels
    left = min(math.floor(box.x1 * width + tiny), width - 1)
    top = min(math.floor(box.y1 * height + tiny), height - 1)
    right, bottom = math.ceil(box.x2 * width - tiny), math.ceil(box.y2 * height - tiny)
    return left, top, max(left + 1, right), max(top + 1, bottom)


def cut(box: Box, part: Rect) -> Box | None:
    """The part of a box that lies inside `part` of the image; None if it has no area."""
    x1, y1, x2, y2 = box.as_tuple()
    corners = max(x1, part.x1), max(y1, part.y1), min(x2, part.x2), min(y2, part.y2)
    return Box(*corners, image=box.image) if corners[0] < corners[2] and corners[1] < corners[3] else None


def out_of_crop(rect: Rect, crop: Rect) -> Box:
    """A rectangle in fractions of a cropped picture → in fractions of the image that it was cut from.

    Raises:
        ValueError: if it does not lie inside the picture, or rounding leaves it without area.
    """
    x1, y1, x2, y2 = _placed(Box(*rect.as_tuple()), crop)
    # Rounding must not carry an edge over the edge of the crop.
    return Box(x1, y1, min(x2, crop.x2), min(y2, crop.y2))


def into_crop(box: Box, crop: Rect) -> Box:
    """The inverse of `out_of_crop`; the part of the box outside the crop is cut off.

    Raises:
        ValueError: if no part of the box lies inside the crop.
    """
    seen = cut(box, crop)
    if seen is None:
        raise ValueError(f"the box {box.as_tuple()} lies outside the crop {crop.as_tuple()}")
    width, height = crop.x2 - crop.x1, crop.y2 - crop.y1
    x1, y1 = (seen.x1 - crop.x1) / width, (seen.y1 - crop.y1) / height
    return Box(x1, y1, min(1.0, (seen.x2 - crop.x1) / width), min(1.0, (seen.y2 - crop.y1) / height), box.image)


def _placed(rect: Rect, crop: Rect) -> tuple[float, float, float, float]:
    """Corners in fractions of a crop → in those of the whole image."""
    width, height = crop.x2 - crop.x1, crop.y2 - crop.y1
    return (
        crop.x1 + rect.x1 * width,
        crop.y1 + rect.y1 * height,
        crop.x1 + rect.x2 * width,
        crop.y1 + rect.y2 * height,
    )


def matched_iou(predicted: Sequence[Box], gold: Sequence[Box]) -> float:
    """Mean IoU over the optimal one-to-one matching, 0..1 (docs/method.md, section 7).

    Unmatched boxes on either side count 0, and so do pairs in different images.
    The mean runs over max(len(predicted), len(gold)) pairs, so neither a spray of boxes nor one box over the whole
    image earns a high reward. 0 if either side is empty.
    """
    if not predicted or not gold:
        return 0.0
    iou = np.array([[p.iou(g) for g in gold] for p in predicted])
    rows, cols = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, cols].sum() / max(len(predicted), len(gold)))


def _widen(flags: BoolArray, margin: int) -> BoolArray:
    """Grow the run of True by `margin` on both sides."""
    index = np.flatnonzero(flags)
    if margin == 0 or index.size == 0:
        return flags
    out = flags.copy()
    out[max(0, index[0] - margin) : index[-1] + margin + 1] = True
    return out
