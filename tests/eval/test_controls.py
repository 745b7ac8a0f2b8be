"""Masks of the controls that need more than the number of kept tokens."""

from pathlib import Path

import numpy as np
import pytest

from vitos.core.geometry import Box, Rect, TokenGrid
from vitos.core.record import Record
from vitos.core.sparsify import KeepRule, Kept
from vitos.engines.base import derive_seed
from vitos.eval.controls import control_masks

SQUARE = TokenGrid.single(8, 8)


def masks(grid, gold, rule=KeepRule()):
    record = Record("x", (Path("x.png"),), "<image>?", "A", gold)
    own = np.arange(grid.num_tokens) < 3
    return control_masks(Kept(grid, own), record, [Box(0, 0, 0.3, 0.1)], [0.25], controls=True, seed=0, keep=rule)


@pytest.mark.parametrize(("rule", "count"), [(KeepRule(), 4), (KeepRule(margin=1), 16), (KeepRule(min_tokens=9), 9)])
def test_gold_boxes_keep_what_the_model_s_rule_keeps(rule, count):
    box = Box(0.3, 0.3, 0.45, 0.45)  # over four cells
    oracle = masks(SQUARE, (box,), rule)["oracle"]
    assert oracle.sum() == count
    assert oracle[SQUARE.overlapping([box])].all()


@pytest.mark.parametrize(
    ("budget", "defined"), [(0.25, True), (0.5, True), (0.52, False), (0.75, False), (1.0, False)]
)
def test_inverted_boxes_have_the_budget_or_are_left_out(budget, defined):
    """Above half of the tokens too few lie outside; a control with a quarter of them is none at three quarters."""
    record, box = Record("x", (Path("x.png"),), "<image>?", "A", None), Box(0, 0, 0.3, 0.1)
    own = Kept(SQUARE, np.arange(64) < 3)
    found = control_masks(own, record, [box], [budget], controls=False, seed=0)
    inverted = found[f"inverted@{budget:g}"]
    assert (inverted is not None) == defined
    if defined:
        assert inverted.sum() == round(64 * budget)
        assert not (inverted & found[f"own@{budget:g}"]).any()


def test_leaving_one_out_changes_no_other_draw():
    record, box = Record("x", (Path("x.png"),), "<image>?", "A", None), Box(0, 0, 0.3, 0.1)
    own = Kept(SQUARE, np.arange(64) < 3)
    rng = np.random.default_rng(derive_seed(0, "controls", "x"))
    first, again = rng.permutation(64), (rng.permutation(64), rng.permutation(64))[1]
    found = control_masks(own, record, [box], [0.75, 0.25], controls=False, seed=0)
    np.testing.assert_array_equal(np.flatnonzero(found["random@0.75"]), np.sort(first.argsort()[:48]))
    np.testing.assert_array_equal(np.flatnonzero(found["random@0.25"]), np.sort(again.argsort()[:16]))


def test_gold_boxes_that_were_cut_off_are_no_evidence_and_no_error():
    cropped = TokenGrid.single(8, 8, Rect(0.25, 0, 0.75, 1))  # the centre of a wide image
    for gold in ((Box(0, 0, 0.2, 1),), None):
        found = masks(cropped, gold)
        assert found["oracle"] is found["oracle@0.25"] is None
        assert found["random@0.25"].sum() == 16
    both = masks(cropped, (Box(0, 0, 0.2, 1), Box(0.5, 0, 0.55, 0.1)))
    assert (both["oracle"] == cropped.overlapping([Box(0.5, 0, 0.55, 0.1)])).all()
