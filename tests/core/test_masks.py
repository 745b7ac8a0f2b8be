from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitos.core.geometry import Box, Rect, TokenGrid, View
from vitos.core.masks import centre_mask, fit_budget, inverted_mask, random_mask, shifted_mask

SQUARE = TokenGrid.single(4, 4)
PADDED = TokenGrid.single(4, 4, Rect(-0.5, 0.0, 1.5, 1.0))  # a portrait in a square: columns 0 and 3 see padding
TILED = TokenGrid(
    (
        View(Rect(0, 0, 1, 1), 3, 3),
        View(Rect(0, 0, 0.5, 1), 4, 2),
        View(Rect(0.5, 0, 1, 1), 4, 2),
    )
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cells(mask: np.ndarray, rows: int = 4) -> list[str]:
    return ["".join("#" if kept else "." for kept in row) for row in mask.reshape(rows, -1)]


grids = st.one_of(
    st.builds(TokenGrid.single, st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([PADDED, TILED]),
)
boxes = st.tuples(st.integers(0, 18), st.integers(0, 18), st.integers(1, 20), st.integers(1, 20)).map(
    lambda v: Box(v[0] / 20, v[1] / 20, min(v[0] + v[2], 20) / 20, min(v[1] + v[3], 20) / 20)
)
box_lists = st.lists(boxes, min_size=1, max_size=3)


@given(grids, st.data())
def test_budgets_are_met_exactly(grid: TokenGrid, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, grid.num_tokens))
    evidence = data.draw(box_lists)
    for mask in (
        random_mask(grid, count, rng()),
        centre_mask(grid, count),
        fit_budget(grid, evidence, count),
        shifted_mask(grid, evidence, rng(), count=count),
    ):
        assert mask.dtype == bool
        assert mask.shape == (grid.num_tokens,)
        assert mask.sum() == count


def test_random_mask_is_uniform_over_tokens() -> None:
    source = rng(1)
    share = np.mean([random_mask(SQUARE, 4, source) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(share, 0.25, atol=0.035)  # five standard deviations


def test_random_mask_follows_its_generator() -> None:
    assert (random_mask(SQUARE, 8, rng(3)) == random_mask(SQUARE, 8, rng(3))).all()
    assert (random_mask(SQUARE, 8, rng(3)) != random_mask(SQUARE, 8, rng(4))).any()


def test_random_and_centre_masks_take_padding_last() -> None:
    inside = [".##."] * 4
    assert cells(random_mask(PADDED, 8, rng())) == inside
    assert cells(centre_mask(PADDED, 8)) == inside
    assert (random_mask(PADDED, 9, rng()) & ~centre_mask(PADDED, 8)).sum() == 1


def test_centre_mask_by_hand() -> None:
    assert cells(centre_mask(SQUARE, 4)) == ["....", ".##.", ".##.", "...."]
    # Eight cells share the next distance: the first three by index.
    assert cells(centre_mask(SQUARE, 7)) == [".##.", "###.", ".##.", "...."]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_centre_mask_equals_exact_arithmetic(rows: int, cols: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows * cols))

    def key(token: int) -> tuple[Fraction, int]:
        y, x = divmod(token, cols)
        dx, dy = Fraction(2 * x + 1, 2 * cols) - Fraction(1, 2), Fraction(2 * y + 1, 2 * rows) - Fraction(1, 2)
        return dx**2 + dy**2, token

    expected = sorted(sorted(range(rows * cols), key=key)[:count])
    assert np.flatnonzero(centre_mask(TokenGrid.single(rows, cols), count)).tolist() == expected


@given(grids, box_lists, st.integers(0, 9))
def test_inverted_mask_is_outside_at_equal_count(grid: TokenGrid, evidence: list[Box], seed: int) -> None:
    mask = grid.overlapping(evidence)
    if mask.all():
        with pytest.raises(ValueError, match="keeps every token"):
            inverted_mask(grid, mask, rng(seed))
        return
    inverted = inverted_mask(grid, mask, rng(seed))
    assert not (inverted & mask).any()
    assert inverted.sum() == min(mask.sum(), (~mask).sum())


def test_inverted_mask_takes_padding_last() -> None:
    mask = PADDED.overlapping([Box(0.0, 0.0, 0.4, 1.0)])
    assert cells(mask) == [".#.."] * 4
    assert cells(inverted_mask(PADDED, mask, rng())) == ["..#."] * 4
    assert inverted_mask(PADDED, mask, rng(), count=12).sum() == 12


def brute_force_overlap(mask: np.ndarray, avoid: np.ndarray) -> int:
    """Fewest cells of `avoid` under `mask` moved by any whole-cell offset that stays in the grid."""
    rows, cols = mask.shape
    kept = [(r, c) for r in range(rows) for c in range(cols) if mask[r, c]]
    costs = [
        sum(bool(avoid[r + dr, c + dc]) for r, c in kept)
        for dr in range(-rows, rows)
        for dc in range(-cols, cols)
        if all(0 <= r + dr < rows and 0 <= c + dc < cols for r, c in kept)
    ]
    return min(costs)


def pattern(mask: np.ndarray) -> set[tuple[int, int]]:
    """Kept cells relative to the upper left corner of their bounding box."""
    r, c = np.nonzero(mask)
    return set(zip((r - r.min()).tolist(), (c - c.min()).tolist(), strict=True))


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), box_lists, st.integers(0, 1), st.integers(0, 9))
def test_shifted_mask_is_the_same_pattern_as_far_away_as_possible(
    rows: int, cols: int, evidence: list[Box], margin: int, seed: int
) -> None:
    grid = TokenGrid.single(rows, cols)
    original = grid.overlapping(evidence, margin).reshape(rows, cols)
    shifted = shifted_mask(grid, evidence, rng(seed), margin=margin).reshape(rows, cols)
    assert pattern(shifted) == pattern(original)
    assert (shifted & original).sum() == brute_force_overlap(original, original)


def test_shifted_mask_draws_among_the_best_places() -> None:
    corner = [Box(0.0, 0.0, 0.2, 0.2)]
    places = {int(np.flatnonzero(shifted_mask(SQUARE, corner, rng(seed)))[0]) for seed in range(300)}
    assert places == set(range(1, 16))


def test_shifted_mask_avoids_padding() -> None:
    left = [Box(0.0, 0.0, 0.4, 1.0)]
    assert cells(shifted_mask(PADDED, left, rng())) == ["..#."] * 4


def test_shifted_mask_moves_every_view_within_itself() -> None:
    mask = shifted_mask(TILED, [Box(0.0, 0.0, 0.3, 0.3)], rng())
    original = TILED.overlapping([Box(0.0, 0.0, 0.3, 0.3)])
    for view in (slice(0, 9), slice(9, 17), slice(17, 25)):
        assert mask[view].sum() == original[view].sum()
    assert not (mask & original).any()


def test_fit_budget_by_hand() -> None:
    evidence = [Box(0.0, 0.0, 0.75, 0.25)]  # the first three cells of the first row
    assert cells(fit_budget(SQUARE, evidence, 1)) == [".#..", "....", "....", "...."]
    assert cells(fit_budget(SQUARE, evidence, 2)) == ["##..", "....", "....", "...."]
    assert cells(fit_budget(SQUARE, evidence, 3)) == ["###.", "....", "....", "...."]
    # The cells next to the box are all half a cell away: by index. The corner cell of the second row is the next.
    assert cells(fit_budget(SQUARE, evidence, 6)) == ["####", "##..", "....", "...."]
    assert cells(fit_budget(SQUARE, evidence, 8)) == ["####", "####", "....", "...."]


def test_fit_budget_cuts_two_boxes_around_their_own_centres() -> None:
    evidence = [Box(0.0, 0.0, 0.75, 0.25), Box(0.25, 0.75, 1.0, 1.0)]
    assert cells(fit_budget(SQUARE, evidence, 2)) == [".#..", "....", "....", "..#."]


@given(grids, box_lists, st.data())
def test_fit_budget_contains_or_is_part_of_the_evidence(
    grid: TokenGrid, evidence: list[Box], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, grid.num_tokens))
    kept, fitted = grid.overlapping(evidence), fit_budget(grid, evidence, count)
    if count <= kept.sum():
        assert (fitted <= kept).all()
    else:
        assert (kept <= fitted).all()
    if count > 1:
        assert (fit_budget(grid, evidence, count - 1) <= fitted).all()


@given(st.integers(1, 7), st.integers(1, 7), boxes, st.data())
def test_fit_budget_equals_exact_arithmetic(rows: int, cols: int, box: Box, data: st.DataObject) -> None:
    x1, y1, x2, y2 = (Fraction(round(v * 20), 20) for v in box.as_tuple())
    count = data.draw(st.integers(1, rows * cols))

    def key(token: int) -> tuple[bool, Fraction, int]:
        r, c = divmod(token, cols)
        x, y = Fraction(2 * c + 1, 2 * cols), Fraction(2 * r + 1, 2 * rows)
        overlaps = (
            Fraction(c, cols) < x2
            and Fraction(c + 1, cols) > x1
            and Fraction(r, rows) < y2
            and Fraction(r + 1, rows) > y1
        )
        if overlaps:
            return False, (x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2, token
        return True, max(x1 - x, x - x2, Fraction(0)) ** 2 + max(y1 - y, y - y2, Fraction(0)) ** 2, token

    expected = sorted(sorted(range(rows * cols), key=key)[:count])
    assert np.flatnonzero(fit_budget(TokenGrid.single(rows, cols), [box], count)).tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_mask(SQUARE, 0, rng()), r"1\.\.16.*got 0"),
        (lambda: centre_mask(SQUARE, 17), r"1\.\.16.*got 17"),
        (lambda: fit_budget(SQUARE, [Box(0, 0, 1, 1)], 17), "got 17"),
        (lambda: fit_budget(SQUARE, [], 4), "no box"),
        (lambda: shifted_mask(SQUARE, [], rng()), "no box"),
        (lambda: shifted_mask(SQUARE, [Box(0, 0, 1, 1)], rng(), margin=1, count=4), "either margin or count"),
        (lambda: inverted_mask(SQUARE, np.ones(4, dtype=bool), rng()), "16 visual tokens"),
        (lambda: inverted_mask(SQUARE, centre_mask(SQUARE, 10), rng(), count=7), "drops 6"),
        (lambda: inverted_mask(SQUARE, np.zeros(16, dtype=bool), rng()), "got 0"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
