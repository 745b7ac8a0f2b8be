"""Several images in one picture: each tile is the overlay of its image alone."""

import numpy as np
import pytest
from PIL import Image

from vitos.core.geometry import Box, TokenGrid
from vitos.reports.overlay import PREDICTED_COLOUR, draw_overlay
from vitos.reports.sheet import draw_sheet

GRID = TokenGrid.single(4, 4)


def images(count):
    return [Image.new("RGB", (128, 128), (60 + 4 * number,) * 3) for number in range(count)]


def test_one_image_is_its_overlay():
    (image,), mask = images(1), np.arange(16) < 5
    assert draw_sheet([image], GRID, mask, [Box(0, 0, 1, 1)]) == draw_overlay(image, GRID, mask, [Box(0, 0, 1, 1)])


@pytest.mark.parametrize("count", [2, 3, 5, 17, 40])
def test_each_image_has_its_own_tokens_and_boxes(count):
    grid = TokenGrid.joined([GRID] * count)
    mask = np.zeros(grid.num_tokens, dtype=bool)
    mask[-16:] = True  # all of the last image
    sheet = draw_sheet(images(count), grid, mask, [Box(0.25, 0.25, 0.75, 0.75, count)], numbers=range(5, 5 + count))
    pixels = np.asarray(sheet)
    # One box, in the last tile; nowhere else is its colour, or near it where a tile is made smaller.
    rows, cols = np.nonzero(np.abs(pixels.astype(int) - PREDICTED_COLOUR).max(-1) < 60)
    assert len(rows)
    side = {2: 384, 3: 384, 5: 256}.get(count, 160)
    columns = {2: 2, 3: 2, 5: 3, 17: 5, 40: 7}[count]
    row, column = divmod(count - 1, columns)
    assert (column * (side + 6) <= cols).all()
    assert (cols <= (column + 1) * (side + 6)).all()
    assert (rows >= row * (side + 24)).all()
    last = pixels[row * (side + 24) + 34, column * (side + 6) + 16]
    first = pixels[34, 16]
    assert abs(int(last[0]) - (60 + 4 * (count - 1))) <= 2  # bright
    assert first[0] < 45  # dimmed


def test_without_tokens_nothing_is_dimmed():
    pixels = np.asarray(draw_sheet(images(2), None, None, []))
    assert tuple(pixels[200, 200]) == (60, 60, 60)


def test_a_grid_of_other_images_is_refused():
    with pytest.raises(ValueError, match="the grid is of 2 images, but 3"):
        draw_sheet(images(3), TokenGrid.joined([GRID] * 2), None, [])
