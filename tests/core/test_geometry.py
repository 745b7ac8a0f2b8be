"""Boxes and cells against exact fractions; matching against all permutations."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View, enclosing, matched_iou, touched_pixels


@st.composite
def intervals(draw, unit=None):
    """Two sides in 0..1: any floats, or multiples of 1/unit, which lie on cells' edges."""
    any_float = st.floats(0, 1)
    side = any_float if unit is None else st.integers(0, unit).map(lambda k: k / unit) | any_float
    low, high = sorted((draw(side), draw(side)))
    return (low, high) if low < high else (0.25, 0.5)


@st.composite
def grids_and_boxes(draw):
    rects = [WHOLE_IMAGE, Rect(-0.5, 0.0, 1.5, 1.0), Rect(0.0, -0.125, 1.0, 1.125), Rect(0.5, 0.0, 1.0, 0.5)]
    # Powers of two divide exactly, so that both sides of the comparison see the same edges.
    view = st.builds(View, st.sampled_from(rects), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]))
    views = draw(st.lists(view, min_size=1, max_size=3))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        (x1, x2), (y1, y2) = draw(intervals(16)), draw(intervals(16))
        boxes.append(Box(x1, y1, x2, y2))
    return TokenGrid(tuple(views)), boxes


def exact_overlap(view, row, col, box):
    """Area that a cell shares with a box, as an exact fraction."""
    r = [Fraction(v) for v in view.rect.as_tuple()]
    x1, x2 = (r[0] + (r[2] - r[0]) * k / view.cols for k in (col, col + 1))
    y1, y2 = (r[1] + (r[3] - r[1]) * k / view.rows for k in (row, row + 1))
    b = [Fraction(v) for v in box.as_tuple()]
    return max(min(x2, b[2]) - max(x1, b[0]), 0) * max(min(y2, b[3]) - max(y1, b[1]), 0)


@given(grids_and_boxes())
def test_overlapping_is_positive_shared_area(case):
    grid, boxes = case
    expected = [
        any(exact_overlap(view, row, col, box) > 0 for box in boxes)
        for view in grid.views
        for row in range(view.rows)
        for col in range(view.cols)
    ]
    assert grid.overlapping(boxes).tolist() == expected


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_box_on_cell_edges_keeps_these_cells_and_no_more(rows, cols, data):
    """k/n in floats, as every number of cells makes it, not only powers of two."""
    c1, c2 = sorted(data.draw(st.lists(st.integers(0, cols), min_size=2, max_size=2, unique=True)))
    r1, r2 = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2, unique=True)))
    mask = TokenGrid.single(rows, cols).overlapping([Box(c1 / cols, r1 / rows, c2 / cols, r2 / rows)])
    expected = np.zeros((rows, cols), dtype=bool)
    expected[r1:r2, c1:c2] = True
    assert np.array_equal(mask.reshape(rows, cols), expected)


@given(grids_and_boxes(), st.integers(0, 5))
def test_margin_widens_every_box_by_cells(case, margin):
    grid, boxes = case
    expected = []
    for view in grid.views:
        wide = np.zeros((view.rows, view.cols), dtype=bool)
        for box in boxes:
            own = TokenGrid((view,)).overlapping([box]).reshape(view.rows, view.cols)
            for row, col in np.argwhere(own):
                for r, c in itertools.product(range(view.rows), range(view.cols)):
                    wide[r, c] |= abs(r - row) <= margin and abs(c - col) <= margin
        expected.append(wide.ravel())
    assert np.array_equal(grid.overlapping(boxes, margin), np.concatenate(expected))


def test_padded_square():
    """An image twice as wide as high, padded above and below: the bars see nothing, the middle rows do."""
    grid = TokenGrid.single(4, 4, Rect(0.0, -0.5, 1.0, 1.5))
    assert grid.overlapping([Box(0, 0, 1, 1)]).reshape(4, 4).tolist() == [
        [False] * 4,
        [True] * 4,
        [True] * 4,
        [False] * 4,
    ]
    assert grid.overlapping([Box(0.3, 0.6, 0.4, 0.7)]).nonzero()[0].tolist() == [9]


def test_views_are_numbered_one_after_the_other():
    """A thumbnail, then the left and the right tile."""
    grid = TokenGrid((View(WHOLE_IMAGE, 1, 2), View(Rect(0, 0, 0.5, 1), 2, 1), View(Rect(0.5, 0, 1, 1), 2, 1)))
    assert grid.num_tokens == 6
    assert grid.overlapping([Box(0.1, 0.1, 0.2, 0.2)]).nonzero()[0].tolist() == [0, 2]
    assert grid.overlapping([Box(0.6, 0.6, 0.7, 0.7)]).nonzero()[0].tolist() == [1, 5]
    assert np.allclose(
        grid.centres(), [[0.25, 0.5], [0.75, 0.5], [0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    )


def test_cell_boxes_are_in_token_order():
    first, second, *_, last = View(Rect(0.0, 0.0, 1.0, 0.5), 2, 4).cell_boxes()
    assert first.as_tuple() == (0, 0, 0.25, 0.25)
    assert second.as_tuple() == (0.25, 0, 0.5, 0.25)
    assert last.as_tuple() == (0.75, 0.25, 1, 0.5)


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ((math.nan, 0, 1, 1), "finite"),
        ((0, 0, math.inf, 1), "finite"),
        ((0.5, 0, 0.5, 1), "x1 < x2"),
        ((0.6, 0, 0.5, 1), "x1 < x2"),
        ((0, 0.6, 1, 0.5), "y1 < y2"),
        ((-0.01, 0, 1, 1), "0..1"),
        ((0, 0, 1, 1.01), "0..1"),
        ((0, 0, 2, 1), "0..1"),
    ],
)
def test_invalid_boxes(numbers, problem):
    with pytest.raises(ValueError, match=problem):
        Box(*numbers)


def test_a_rect_may_reach_outside_but_not_be_empty():
    assert Rect(-1, -1, 2, 2).area == 9
    with pytest.raises(ValueError, match="x1 < x2"):
        Rect(0, 0, 0, 1)
    with pytest.raises(ValueError, match="at least one row"):
        View(WHOLE_IMAGE, 0, 3)


def test_box_is_a_value():
    box = Box(0, 0, 0.5, 1)
    assert len({box, Box(0, 0, 0.5, 1), Box(0, 0, 0.5, 0.9)}) == 2
    with pytest.raises(AttributeError):
        box.x1 = 0.2


@given(intervals(), intervals(), intervals(), intervals())
def test_iou_against_exact_fractions(ax, ay, bx, by):
    a, b = Box(ax[0], ay[0], ax[1], ay[1]), Box(bx[0], by[0], bx[1], by[1])
    (ax1, ax2), (ay1, ay2), (bx1, bx2), (by1, by2) = ((Fraction(u), Fraction(v)) for u, v in (ax, ay, bx, by))
    shared = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared
    assert 0 <= a.iou(b) <= 1
    assert a.iou(b) == b.iou(a)
    if min(a.area, b.area) > 1e-300:  # below, areas are not normal numbers
        assert a.iou(b) == pytest.approx(float(shared / union), rel=1e-9, abs=1e-12)
        assert a.iou(a) == 1


hundredths = st.builds(
    lambda x, y, w, h: Box(x / 100, y / 100, min(100, x + w) / 100, min(100, y + h) / 100),
    st.integers(0, 90), st.integers(0, 90), st.integers(1, 60), st.integers(1, 60),
)  # fmt: skip


@given(st.lists(hundredths, max_size=5), st.lists(hundredths, max_size=4))
def test_matched_iou_is_the_best_of_all_matchings(predicted, gold):
    few, many = sorted((predicted, gold), key=len)
    best = max(
        sum(a.iou(b) for a, b in zip(few, chosen, strict=True)) for chosen in itertools.permutations(many, len(few))
    )
    assert matched_iou(predicted, gold) == pytest.approx(best / max(1, len(many)) if few else 0.0)


def test_box_spam_and_whole_image_boxes_do_not_pay():
    gold = [Box(0.1, 0.1, 0.3, 0.3)]
    assert matched_iou(gold, gold) == 1
    assert matched_iou(gold * 4, gold) == 0.25
    assert matched_iou([Box(0, 0, 1, 1)], gold) == pytest.approx(0.04)
    assert matched_iou([], gold) == matched_iou(gold, []) == 0


# --- rectangles -----------------------------------------------------------------------------------------------------


@given(st.lists(st.builds(Box, st.just(0.2), st.floats(0, 0.4), st.floats(0.5, 1), st.just(0.5)), min_size=1))
def test_the_enclosing_rectangle_is_the_smallest(boxes):
    found = enclosing(boxes)
    assert all(found.x1 <= b.x1 and found.y1 <= b.y1 and found.x2 >= b.x2 and found.y2 >= b.y2 for b in boxes)
    for index, edge in enumerate(found.as_tuple()):
        assert edge in [box.as_tuple()[index] for box in boxes]


@given(st.data(), st.integers(1, 300), st.integers(1, 300))
def test_touched_pixels_are_all_that_a_box_covers(data, width, height):
    """Against exact thousandths."""
    edges, expected = [], []
    for side in (width, height):
        low = data.draw(st.integers(0, 999))
        high = data.draw(st.integers(low + 1, 1000))
        edges.append((low / 1000, high / 1000))
        expected.append([i for i in range(side) if low * side < (i + 1) * 1000 and high * side > i * 1000])
    left, top, right, bottom = touched_pixels(Box(edges[0][0], edges[1][0], edges[0][1], edges[1][1]), width, height)
    assert [list(range(left, right)), list(range(top, bottom))] == expected


def test_a_box_thinner_than_rounding_touches_one_pixel():
    thin = 1 - 1e-9
    assert touched_pixels(Box(thin, 0.5, 1.0, 0.5 + 1e-9), 10, 10) == (9, 5, 10, 6)
