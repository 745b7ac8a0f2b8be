"""The images of one question in one picture, each with its number, its kept cells and its boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from vitos.core.geometry import WHOLE_IMAGE, BoolArray, Box, Rect, TokenGrid
from vitos.reports.overlay import draw_overlay

_GAP = 6
_STRIP = 18  # height of the line above an image, in pixels
_BACKGROUND = (18, 24, 44)
_KEPT, _DROPPED = (255, 255, 255), (140, 148, 168)
# Longest side of a tile by the number of images: two dates are looked at closely, forty slices are an overview.
_SIDES = ((4, 384), (16, 256), (10**9, 160))


def draw_sheet(
    images: Sequence[Image.Image],
    grid: TokenGrid | None,
    kept: BoolArray | None,
    boxes: Sequence[Box],
    gold_boxes: Sequence[Box] = (),
    numbers: Sequence[int] = (),
) -> Image.Image:
    """`draw_overlay` of each image, side by side; the overlay itself for one image.

    Args:
        images: whole upright images, in the order of the question.
        grid: the visual tokens of all of them; None draws only boxes.
        kept: mask of the kept tokens, shape (num_tokens,); None for all images undimmed.
        boxes: predicted evidence, drawn in the image that each box names.
        gold_boxes: annotated evidence.
        numbers: number of each image in the prompt; by default its place, from 1.

    Returns:
        A new RGB image.

    Raises:
        ValueError: if images, grid and mask do not fit one another.
    """
    if len(images) == 1:
        return draw_overlay(images[0], grid, kept, boxes, gold_boxes)
    if grid is not None and len(grid.images) != len(images):
        raise ValueError(f"the grid is of {len(grid.images)} images, but {len(images)} are to be drawn")
    grids = [None] * len(images) if grid is None else list(grid.images)
    masks = [None] * len(images) if kept is None or grid is None else grid.split(kept)
    tiles, titles = [], []
    for place, (image, one, mask) in enumerate(zip(images, grids, masks, strict=True), start=1):
        own, gold = ([box for box in given if box.image == place] for given in (boxes, gold_boxes))
        tiles.append(draw_overlay(image, one, mask, own, gold, min_side=tile_side(len(images))))
        number = str(numbers[place - 1] if numbers else place)
        titles.append(number if mask is None else f"{number}: {int(mask.sum())} of {mask.size}")
    return lay_out(tiles, titles, [mask is None or bool(mask.any()) for mask in masks])[0]


def tile_side(count: int) -> int:
    """Longest side of an image in a sheet of that many, in pixels."""
    return next(side for most, side in _SIDES if count <= most)


def lay_out(
    images: Sequence[Image.Image], titles: Sequence[str] = (), bright: Sequence[bool] = ()
) -> tuple[Image.Image, list[Rect]]:
    """Images row by row, in a sheet about as wide as it is high, each made smaller to fit its tile.

    Args:
        images: at least one, RGB.
        titles: text above each image; by default its place, from 1.
        bright: whether each title is white, not gray.

    Returns:
        The sheet, and the place of each image in it, in fractions of the sheet.
    """
    side, tiles, rects = tile_side(len(images)), [image.copy() for image in images], []
    for tile in tiles:
        tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    columns = min(len(tiles), 2 if len(tiles) <= 4 else math.ceil(math.sqrt(len(tiles))))
    height = max(tile.height for tile in tiles) + _STRIP
    width, whole = columns * (side + _GAP) + _GAP, math.ceil(len(tiles) / columns) * (height + _GAP) + _GAP
    sheet = Image.new("RGB", (width, whole), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = _GAP + column * (side + _GAP), _GAP + row * (height + _GAP) + _STRIP
        title = titles[index] if titles else str(index + 1)
        draw.text((left, top - _STRIP + 2), title, fill=_KEPT if not bright or bright[index] else _DROPPED)
        sheet.paste(tile, (left, top))
        rects.append(Rect(left / width, top / whole, (left + tile.width) / width, (top + tile.height) / whole))
    return sheet, rects


def placed(rect: Rect, tile: Rect) -> tuple[float, float, float, float]:
    """The corners of a rectangle of an image in the sheet in which the image takes a tile."""
    if tile == WHOLE_IMAGE:
        return rect.as_tuple()
    width, height = tile.x2 - tile.x1, tile.y2 - tile.y1
    return (
        tile.x1 + rect.x1 * width,
        tile.y1 + rect.y1 * height,
        tile.x1 + rect.x2 * width,
        tile.y1 + rect.y2 * height,
    )
