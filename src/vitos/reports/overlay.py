"""One picture of what the model looked at: kept cells bright, dropped cells dimmed, boxes on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitos.core.geometry import BoolArray, Box, Rect, TokenGrid, View

# Okabe–Ito colours, which differ under every common colour vision deficiency. The gold box is dashed as well.
PREDICTED_COLOUR = (230, 159, 0)
GOLD_COLOUR = (86, 180, 233)
SCORE_COLOUR = (204, 121, 167)

_HALO = (0, 0, 0, 150)
_CELL_LINE = (255, 255, 255, 56)
_KEPT_EDGE = (255, 255, 255, 190)
_VIEW_LINE = (255, 255, 255, 120)
# Share of the picture that remains in dropped cells; the rest is a dark blue, which differs from black too.
_DIM = 0.4
_DIM_COLOUR = np.array([18.0, 24.0, 44.0])
# Share of the colour at the highest score, so that the picture stays visible.
_SCORE_SHARE = 0.65
T = TypeVar("T", bound=np.generic)


def draw_overlay(
    image: Image.Image,
    grid: TokenGrid | None,
    kept: Sequence[int] | BoolArray | None,
    boxes: Sequence[Box],
    gold_boxes: Sequence[Box] = (),
    min_side: int = 384,
    scores: Sequence[float] | NDArray[np.floating[Any]] | None = None,
) -> Image.Image:
    """Draw kept tokens, predicted boxes (orange) and gold boxes (sky blue, dashed) over an image.

    If the grid has several views, the first that covers all of the shown image is drawn with its cells and the others
    as outlines; if none covers it, a pixel is bright where any view keeps it. Cells outside the image (padding) are
    not drawn; what a crop left out is dark.

    Args:
        image: upright original image, whole where the model saw a crop of it, any mode.
        grid: its visual tokens; None draws only boxes.
        kept: token indices, or a mask of shape (num_tokens,); None draws the image undimmed and without cells.
        boxes: predicted evidence.
        gold_boxes: annotated evidence.
        min_side: images with a side smaller than this are enlarged by an integer factor, without smoothing; narrow
            strips only until their long side reaches four times this.
        scores: a number in 0..1 per token, painted over its cell the denser the higher (purple); needs the grid.

    Returns:
        A new RGB image; its side lengths are those of `image` times an integer.

    Raises:
        ValueError: if `kept` or `scores` do not fit `grid`, or are given without one.
    """
    if min_side < 1:
        raise ValueError(f"min_side must be at least 1, got {min_side}")
    factor = max(1, min(math.ceil(min_side / min(image.size)), 4 * min_side // max(image.size)))
    width, height = image.width * factor, image.height * factor
    canvas = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    line = max(2, round(min(width, height) / 160))

    if kept is not None:
        if grid is None:
            raise ValueError("kept tokens need the grid they are numbered in; pass grid, or kept=None")
        shown = _shown_views(grid, as_mask(kept, grid.num_tokens))
        canvas = _dim(canvas, shown)
        draw = ImageDraw.Draw(canvas, "RGBA")
        for view in grid.views:
            if all(view is not other for other, _ in shown):
                draw.rectangle(_pixels(view.rect, canvas.size), outline=_VIEW_LINE, width=max(1, line // 2))
        for view, mask in shown:
            _draw_cells(draw, view, mask, canvas.size, max(1, line // 2))

    if scores is not None:
        if grid is None or len(scores) != grid.num_tokens:
            raise ValueError("scores need the grid of their tokens, one number for each")
        canvas = _tint(canvas, _shown_views(grid, np.asarray(scores, dtype=np.float64)))

    draw = ImageDraw.Draw(canvas, "RGBA")
    for box in boxes:
        _draw_box(draw, _pixels(box, canvas.size), PREDICTED_COLOUR, line)
    for box in gold_boxes:
        _draw_box(draw, _pixels(box, canvas.size), GOLD_COLOUR, line, dash=5 * line)
    return canvas


def as_mask(kept: Sequence[int] | BoolArray, num_tokens: int) -> BoolArray:
    """Kept tokens, given as indices or as a mask, as a mask of shape (num_tokens,).

    Raises:
        ValueError: if they do not fit that number.
    """
    values = np.asarray(kept)
    if values.dtype == np.bool_:
        if values.shape != (num_tokens,):
            raise ValueError(f"the mask of kept tokens has shape {values.shape}, the grid has {num_tokens} tokens")
        return values
    if values.size and (values.ndim != 1 or not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"kept tokens must be a list of indices or a mask, got {kept!r}")
    if values.size and (values.min() < 0 or values.max() >= num_tokens):
        span = f"{values.min()}..{values.max()}"
        raise ValueError(f"kept tokens must be in 0..{num_tokens - 1}, the grid's tokens; got {span}")
    return np.isin(np.arange(num_tokens), values)


def _shown_views(grid: TokenGrid, mask: NDArray[T]) -> list[tuple[View, NDArray[T]]]:
    """The views whose cells are drawn, each with the values of its cells, shape (rows, cols)."""
    ends = np.cumsum([view.num_tokens for view in grid.views])
    parts = np.split(mask, ends[:-1])
    views = [(view, part.reshape(view.rows, view.cols)) for view, part in zip(grid.views, parts, strict=True)]
    for view, part in views:
        r, s = view.rect, grid.shown
        if r.x1 <= s.x1 and r.y1 <= s.y1 and r.x2 >= s.x2 and r.y2 >= s.y2:
            return [(view, part)]
    return views


def _dim(canvas: Image.Image, shown: Sequence[tuple[View, BoolArray]]) -> Image.Image:
    """Darken every pixel that no kept cell covers."""
    bright = np.zeros((canvas.height, canvas.width), dtype=bool)
    for view, mask in shown:
        x, y = _edges(view, canvas.size)
        for row, col in np.argwhere(mask):
            # Edges left of or above the image are negative, which a slice would count from the far end.
            bright[max(0, y[row]) : max(0, y[row + 1]), max(0, x[col]) : max(0, x[col + 1])] = True
    pixels = np.asarray(canvas, dtype=np.float64)
    dimmed = _DIM * pixels + (1 - _DIM) * _DIM_COLOUR
    return Image.fromarray(np.where(bright[..., None], pixels, dimmed).round().astype(np.uint8))


def _tint(canvas: Image.Image, shown: Sequence[tuple[View, NDArray[np.float64]]]) -> Image.Image:
    """Paint each cell with `SCORE_COLOUR`, by its score; where views overlap, by the highest."""
    share = np.zeros((canvas.height, canvas.width))
    for view, scores in shown:
        x, y = (np.maximum(edges, 0) for edges in _edges(view, canvas.size))
        for (row, col), score in np.ndenumerate(scores):
            cell = share[y[row] : y[row + 1], x[col] : x[col + 1]]
            np.maximum(cell, min(max(score, 0.0), 1.0) * _SCORE_SHARE, out=cell)
    pixels = np.asarray(canvas, dtype=np.float64)
    painted = pixels + share[..., None] * (np.array(SCORE_COLOUR, dtype=np.float64) - pixels)
    return Image.fromarray(painted.round().astype(np.uint8))


def _draw_cells(draw: ImageDraw.ImageDraw, view: View, mask: BoolArray, size: tuple[int, int], line: int) -> None:
    """Draw each line between two cells once: faint between kept cells, strong between kept and dropped."""
    x, y = _edges(view, size)
    # Cells in the padding, or less than a pixel wide, have nothing to frame.
    cols = (x[1:] > np.maximum(x[:-1], 0)) & (x[:-1] < size[0])
    rows = (y[1:] > np.maximum(y[:-1], 0)) & (y[:-1] < size[1])
    padded = np.pad(mask & np.outer(rows, cols), 1)
    for row in range(view.rows + 1):
        for col in range(view.cols + 1):
            here = bool(padded[row + 1, col + 1])
            above, left = bool(padded[row, col + 1]), bool(padded[row + 1, col])
            if here or above:
                colour = _CELL_LINE if here and above else _KEPT_EDGE
                top = min(max(y[row], 0), size[1] - line)
                draw.rectangle((x[col], top, x[col + 1] - 1, top + line - 1), fill=colour)
            if here or left:
                colour = _CELL_LINE if here and left else _KEPT_EDGE
                start = min(max(x[col], 0), size[0] - line)
                draw.rectangle((start, y[row], start + line - 1, y[row + 1] - 1), fill=colour)


def _draw_box(
    draw: ImageDraw.ImageDraw,
    pixels: tuple[int, int, int, int],
    colour: tuple[int, int, int],
    line: int,
    dash: int | None = None,
) -> None:
    """Draw a frame inside the box, with a thin dark halo, solid or in dashes that start at the corners."""
    x1, y1, x2, y2 = pixels
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_HALO, width=1)
    if min(x2 - x1, y2 - y1) > 2 * line:
        draw.rectangle((x1 + line, y1 + line, x2 - line, y2 - line), outline=_HALO, width=1)
    for a, b in _dashes(x1, x2, dash):
        draw.rectangle((a, y1, b, y1 + line - 1), fill=colour)
        draw.rectangle((a, y2 - line + 1, b, y2), fill=colour)
    for a, b in _dashes(y1, y2, dash):
        draw.rectangle((x1, a, x1 + line - 1, b), fill=colour)
        draw.rectangle((x2 - line + 1, a, x2, b), fill=colour)


def _dashes(start: int, end: int, dash: int | None) -> list[tuple[int, int]]:
    """Ends of dashes of about `dash` pixels, the gaps a little shorter, one dash at each end; one line without it."""
    if dash is None or end - start < 3 * dash:
        return [(start, end)]
    count = 2 * round((end - start) / (2 * dash)) + 1
    edges = np.linspace(start, end, count + 1).round().astype(int)
    return [(int(edges[i]), int(edges[i + 1])) for i in range(0, count, 2)]


def _edges(view: View, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges of the view's cells in pixels: x, shape (cols + 1,), and y, shape (rows + 1,)."""
    x, y = view.edges()
    return (x * size[0]).round().astype(np.int64), (y * size[1]).round().astype(np.int64)


def _pixels(rect: Rect, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of a rectangle, both inclusive; at least two pixels wide and high."""
    x1, y1 = round(rect.x1 * size[0]), round(rect.y1 * size[1])
    return x1, y1, max(round(rect.x2 * size[0]) - 1, x1 + 1), max(round(rect.y2 * size[1]) - 1, y1 + 1)
