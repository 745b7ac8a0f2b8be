"""Pictures of kept tokens and boxes, pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View
from vitos.reports.overlay import GOLD_COLOUR, PREDICTED_COLOUR, draw_overlay

GREY = (150, 150, 150)


def picture(size=(384, 384), colour=GREY):
    return Image.new("RGB", size, colour)


def centre_of(image, row, col, rows, cols):
    """The pixel in the middle of a cell of a grid over the whole image."""
    return image.getpixel((int((col + 0.5) / cols * image.width), int((row + 0.5) / rows * image.height)))


@pytest.mark.parametrize("as_mask", [False, True])
def test_kept_cells_stay_and_dropped_cells_are_dimmed(as_mask):
    kept = [1, 6]
    mask = np.isin(np.arange(8), kept)
    out = draw_overlay(picture(), TokenGrid.single(2, 4), mask if as_mask else kept, [])
    for token in range(8):
        pixel = centre_of(out, token // 4, token % 4, 2, 4)
        assert pixel == GREY if token in kept else max(pixel) < 100


def test_dropped_cells_differ_on_black_too():
    out = draw_overlay(picture(colour=(0, 0, 0)), TokenGrid.single(2, 2), [0], [])
    assert centre_of(out, 0, 0, 2, 2) == (0, 0, 0)
    assert centre_of(out, 1, 1, 2, 2) != (0, 0, 0)


def test_kept_cells_are_framed_at_the_border_of_the_region():
    out = draw_overlay(picture(), TokenGrid.single(2, 2), [0], [])
    assert min(out.getpixel((192, 50))) > 200  # right edge of the kept cell
    assert max(out.getpixel((192, 300))) < 100  # between two dropped cells


def test_boxes_have_their_colours_on_their_edges():
    out = draw_overlay(picture(), None, None, [Box(0.25, 0.25, 0.5, 0.75)], [Box(0.6, 0.1, 0.9, 0.4)])
    for place in [(96, 96), (96, 200), (191, 200), (140, 287), (191, 287)]:
        assert out.getpixel(place) == PREDICTED_COLOUR
    for corner in [(230, 38), (345, 38), (230, 153), (345, 153)]:
        assert out.getpixel(corner) == GOLD_COLOUR
    assert out.getpixel((140, 200)) == GREY  # inside
    edge = [out.getpixel((x, 38)) for x in range(230, 346)]
    assert 0.3 < sum(pixel == GOLD_COLOUR for pixel in edge) / len(edge) < 0.8  # dashed


def test_equal_boxes_are_both_seen():
    box = Box(0.2, 0.2, 0.8, 0.8)
    out = draw_overlay(picture(), None, None, [box], [box])
    edge = {out.getpixel((x, 77)) for x in range(77, 307)}
    assert {PREDICTED_COLOUR, GOLD_COLOUR} <= edge


def test_small_images_are_enlarged_by_an_integer_without_smoothing():
    small = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10) * 2)
    out = draw_overlay(small, None, None, [], min_side=25)
    assert out.size == (30, 30)
    assert np.array_equal(np.asarray(out)[..., 0], np.kron(np.asarray(small), np.ones((3, 3), np.uint8)))
    assert draw_overlay(picture((500, 400)), None, None, []).size == (500, 400)
    assert max(draw_overlay(picture((4, 400)), None, None, []).size) <= 4 * 384


def test_padded_square_shades_the_cells_where_they_lie():
    # A wide image padded to a square: of 4 rows the image covers the middle two.
    grid = TokenGrid.single(4, 4, Rect(0, -0.5, 1, 1.5))
    out = draw_overlay(picture((400, 400)), grid, [0, 5, 14], [])
    assert centre_of(out, 0, 1, 2, 4) == GREY  # token 5: second row of the grid, first of the image
    assert max(centre_of(out, 0, 0, 2, 4)) < 100
    assert max(centre_of(out, 1, 2, 2, 4)) < 100
    assert max(out.getpixel((50, 0))) < 100  # token 0 is padding: no frame at the image's edge


def test_cells_partly_in_the_padding_are_bright_up_to_the_edge():
    grid = TokenGrid.single(3, 2, Rect(0, -0.25, 1, 1.25))
    out = draw_overlay(picture((400, 400)), grid, [0], [])
    assert out.getpixel((50, 50)) == GREY  # token 0 covers the upper quarter of the left half
    assert max(out.getpixel((250, 50))) < 100
    assert max(out.getpixel((50, 150))) < 100


def test_of_several_views_the_whole_image_is_drawn_and_the_tiles_outlined():
    grid = TokenGrid((View(Rect(0, 0, 0.5, 1), 1, 1), View(WHOLE_IMAGE, 2, 2), View(Rect(0.5, 0, 1, 1), 1, 1)))
    out = draw_overlay(picture(), grid, [0, 1], [])  # the left tile, and the upper left of the whole image
    assert centre_of(out, 0, 0, 2, 2) == GREY
    assert max(centre_of(out, 1, 0, 2, 2)) < 100
    assert out.getpixel((100, 383)) != out.getpixel((100, 370))  # the left tile's outline


def test_tiles_without_a_whole_view_are_all_drawn():
    grid = TokenGrid((View(Rect(0, 0, 0.5, 1), 1, 1), View(Rect(0.5, 0, 1, 1), 2, 1)))
    out = draw_overlay(picture(), grid, [0, 2], [])
    assert centre_of(out, 0, 0, 2, 2) == centre_of(out, 1, 0, 2, 2) == centre_of(out, 1, 1, 2, 2) == GREY
    assert max(centre_of(out, 0, 1, 2, 2)) < 100


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([4], "must be in 0..3"),
        ([-1], "must be in 0..3"),
        (np.ones(5, dtype=bool), "the grid has 4 tokens"),
        ([0.5], "indices or a mask"),
    ],
)
def test_kept_tokens_must_fit_the_grid(kept, message):
    with pytest.raises(ValueError, match=message):
        draw_overlay(picture(), TokenGrid.single(2, 2), kept, [])


def test_kept_tokens_need_a_grid():
    with pytest.raises(ValueError, match="need the grid"):
        draw_overlay(picture(), None, [0], [])


def test_the_input_is_not_changed():
    image = picture()
    draw_overlay(image, TokenGrid.single(2, 2), [], [Box(0, 0, 1, 1)])
    assert image.getextrema() == ((150, 150),) * 3


fraction = st.floats(0, 1, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    cells=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rect=st.tuples(*[st.floats(-1, 0.4), st.floats(-1, 0.4), st.floats(0.5, 2), st.floats(0.5, 2)]),
    corners=st.tuples(fraction, fraction, fraction, fraction),
    data=st.data(),
)
def test_any_grid_and_box_can_be_drawn(size, cells, rect, corners, data):
    grid = TokenGrid.single(*cells, Rect(*rect))
    kept = data.draw(st.lists(st.integers(0, grid.num_tokens - 1), max_size=8))
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    boxes = [Box(x1, y1, x2, y2)] if x1 < x2 and y1 < y2 else []
    out = draw_overlay(picture(size), grid, kept, boxes, boxes, min_side=48)
    assert out.mode == "RGB"
    assert out.width % size[0] == out.height % size[1] == 0
