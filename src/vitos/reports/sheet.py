"""The images of one question in one picture, each with its number, its kept cells and its boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from vitos.core.geometry import BoolArray, Box, TokenGrid
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
    side = next(side for most, side in _SIDES if len(images) <= most)
    tiles = []
    for place, (image, one, mask) in enumerate(zip(images, grids, masks, strict=True), start=1):
        own, gold = ([box for box in given if box.image == place] for given in (boxes, gold_boxes))
        tile = draw_overlay(image, one, mask, own, gold, min_side=side)
        tile.thumbnail((side, side), Image.Resampling.LANCZOS)
        title = f"{numbers[place - 1] if numbers else place}"
        tiles.append((tile, title if mask is None else f"{title}: {int(mask.sum())} of {mask.size}"))
    return _laid_out(tiles, side, [mask is None or bool(mask.any()) for mask in masks])


def _laid_out(tiles: Sequence[tuple[Image.Image, str]], side: int, bright: Sequence[bool]) -> Image.Image:
    """The tiles row by row, in a sheet about as wide as it is high."""
    columns = min(len(tiles), 2 if len(tiles) <= 4 else math.ceil(math.sqrt(len(tiles))))
    height = max(tile.height for tile, _ in tiles) + _STRIP
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, ((tile, title), shown) in enumerate(zip(tiles, bright, strict=True)):
        row, column = divmod(index, columns)
        left, top = _GAP + column * (side + _GAP), _GAP + row * (height + _GAP)
        draw.text((left, top + 2), title, fill=_KEPT if shown else _DROPPED)
        sheet.paste(tile, (left, top + _STRIP))
    return sheet
