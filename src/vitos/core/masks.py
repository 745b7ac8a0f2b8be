"""Keep masks that compare evidence with its alternatives at the same token budget (docs/method.md, section 11).

At 77 % of the tokens a random choice loses almost nothing, so the accuracy at a budget says little without the
accuracy of other tokens at the same budget. Each mask here is bool, shape (num_tokens,), in token order, and keeps at
least one token.

Distances are in image fractions, between cell centres, over the tokens of all views. Cells that see only padding
(LLaVA's padded square) are chosen last: a control that spends its budget on padding would make the evidence look
better than it is. Several images share one budget, and distances are within an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.sparsify import distance_to_boxes, distance_to_centre


def random_mask(grid: TokenGrid, count: int, rng: np.random.Generator) -> BoolArray:
    """`count` tokens, all equally likely.

    Raises:
        ValueError: if `count` is not in 1..num_tokens.
    """
    return _first(count, padding(grid), rng.permutation(grid.num_tokens))


def centre_mask(grid: TokenGrid, count: int) -> BoolArray:
    """The `count` tokens nearest to the centre of what is shown of their image; of equally near ones the first.

    Raises:
        ValueError: if `count` is not in 1..num_tokens.
    """
    return _first(count, padding(grid), distance_to_centre(grid))


def inverted_mask(
    grid: TokenGrid, mask: BoolArray, rng: np.random.Generator, *, count: int | None = None
) -> BoolArray:
    """`count` random tokens out of those that `mask` drops.

    Args:
        grid: the grid of the image.
        mask: the tokens kept as evidence.
        rng: the source of randomness.
        count: number of tokens; None for as many as `mask` keeps or, if fewer lie outside it, all of these. Evidence
            over more than half of the image has no inverse at equal budget: compare the masks' sums.

    Raises:
        ValueError: if `mask` does not fit the grid or drops no token, or `count` is not in 1..dropped tokens.
    """
    if mask.shape != (grid.num_tokens,):
        raise ValueError(f"the keep mask has shape {mask.shape} for {grid.num_tokens} visual tokens")
    outside = int((~mask).sum())
    if outside == 0:
        raise ValueError("the mask keeps every token, nothing lies outside it; leave this sample out of the control")
    if count is None:
        count = min(int(mask.sum()), outside)
    if count > outside:
        raise ValueError(f"cannot keep {count} tokens outside the mask, which drops {outside}")
    return _first(count, mask, padding(grid), rng.permutation(grid.num_tokens))


def shifted_mask(
    grid: TokenGrid,
    boxes: Sequence[Box],
    rng: np.random.Generator,
    *,
    margin: int = 0,
    count: int | None = None,
) -> BoolArray:
    """The tokens of `boxes`, moved as one pattern to another place: same shape, same number of tokens.

    The pattern moves by whole cells to the place within the grid where it shares the fewest tokens with the original
    (and with padding); of several such places one is drawn. Evidence too large to move away keeps part of itself, and
    a pattern as large as the grid stays where it is: measure the overlap with the original before concluding anything.
    Each view moves by itself, since a cell of one view is not a whole number of cells of another.

    Args:
        grid: the grid of the image.
        boxes: the evidence.
        rng: the source of randomness.
        margin: number of cells by which the boxes are widened, as in the keep rule; only without `count`.
        count: number of tokens; the pattern is then `fit_budget(grid, boxes, count)`.

    Raises:
        ValueError: if there is no box, `margin` is given with `count`, or `count` is not in 1..num_tokens.
    """
    if count is not None and margin:
        raise ValueError(f"give either margin or count, got margin={margin} and count={count}")
    mask = _evidence(grid, boxes, margin) if count is None else fit_budget(grid, boxes, count)
    avoid = mask | padding(grid)
    shifted, start = np.zeros_like(mask), 0
    for view in grid.views:
        cells, shape = slice(start, start + view.num_tokens), (view.rows, view.cols)
        shifted[cells] = _moved(mask[cells].reshape(shape), avoid[cells].reshape(shape), rng).ravel()
        start += view.num_tokens
    return shifted


def fit_budget(grid: TokenGrid, boxes: Sequence[Box], count: int) -> BoolArray:
    """Evidence cut or widened to exactly `count` tokens.

    Tokens are taken in one fixed order, so that a smaller budget is always part of a larger one: first those that
    overlap a box, the nearest to a box's centre first; then the others, the nearest to a box first. Of equally near
    tokens the first is taken.

    Raises:
        ValueError: if there is no box, or `count` is not in 1..num_tokens.
    """
    _require_boxes(boxes)
    outside = ~grid.overlapping(boxes)
    distance = np.where(outside, _rounded(distance_to_boxes(grid, boxes)), _distance_to_box_centres(grid, boxes))
    return _first(count, outside, padding(grid), distance)


def padding(grid: TokenGrid) -> BoolArray:
    """Tokens whose cell lies outside the image, or the part of it that is shown."""
    return np.concatenate([~one.overlapping([Box(*one.shown.as_tuple())]) for one in grid.images])


def _first(count: int, *keys: NDArray[np.generic]) -> BoolArray:
    """The `count` smallest tokens in the lexicographic order of `keys`, ties by index."""
    total = len(keys[0])
    if not 1 <= count <= total:
        raise ValueError(f"count must be in 1..{total}, the number of visual tokens, got {count}")
    mask = np.zeros(total, dtype=bool)
    mask[np.lexsort(keys[::-1])[:count]] = True
    return mask


def _distance_to_box_centres(grid: TokenGrid, boxes: Sequence[Box]) -> NDArray[np.float64]:
    """Distance from each cell's centre to the nearest centre of a box in its image; inf where that has no box."""
    parts = []
    for one, own in grid.by_image(boxes):
        points = np.array([((b.x1 + b.x2) / 2, (b.y1 + b.y2) / 2) for b in own]).reshape(1, -1, 2)
        offsets = one.centres()[:, None] - points  # (N, boxes, 2)
        parts.append(np.hypot(offsets[..., 0], offsets[..., 1]).min(axis=1, initial=np.inf))
    return _rounded(np.concatenate(parts))


def _rounded(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance without its last digits, in which cells that mirror each other differ by rounding errors."""
    return np.round(distance, 9)


def _require_boxes(boxes: Sequence[Box]) -> None:
    if not boxes:
        raise ValueError("no box to keep tokens by; such a sample uses the dense image (a counted fallback)")


def _evidence(grid: TokenGrid, boxes: Sequence[Box], margin: int) -> BoolArray:
    _require_boxes(boxes)
    mask = grid.overlapping(boxes, margin)
    if not mask.any():
        raise ValueError(f"boxes {[b.as_tuple() for b in boxes]} overlap no cell of the grid")
    return mask


def _moved(pattern: BoolArray, avoid: BoolArray, rng: np.random.Generator) -> BoolArray:
    """`pattern` moved by whole cells within its grid to where it covers the fewest cells of `avoid`; (rows, cols)."""
    rows, cols = np.nonzero(pattern)
    if rows.size == 0:
        return pattern
    height, width = pattern.shape
    rows, cols = rows - rows.min(), cols - cols.min()
    # Every place of the pattern's upper left corner, shape (places, 1), against its cells, shape (cells,).
    top, left = np.divmod(np.arange((height - rows.max()) * (width - cols.max()))[:, None], width - cols.max())
    cost = avoid[top + rows, left + cols].sum(axis=1)
    place = rng.choice(np.flatnonzero(cost == cost.min()))
    out = np.zeros_like(pattern)
    out[top[place] + rows, left[place] + cols] = True
    return out
