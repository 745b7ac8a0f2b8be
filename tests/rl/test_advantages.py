"""Advantages against hand-computed tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitos.rl.advantages import group_advantages, informative, split_signs

# One question, G = 2 localizations of K = 2: mean 2, deviations -1 -1 / 1 1, std 1.
REWARDS = np.array([[[1.0, 1.0], [3.0, 3.0]], [[0.0, 4.0], [0.0, 4.0]]])


def test_pair_group_by_hand():
    expected = np.array([[[-1, -1], [1, 1]], [[-1, 1], [-1, 1]]]) / (1 + np.array([0.5, 0.25]))[:, None, None]
    # std is 1 for the first question and 2 for the second: (r - mean) / (std + 0.5).
    expected[0], expected[1] = [[-1 / 1.5] * 2, [1 / 1.5] * 2], [[-2 / 2.5, 2 / 2.5]] * 2
    np.testing.assert_allclose(group_advantages(REWARDS, std_floor=0.5), expected)


def test_evidence_group_by_hand():
    expected = [[[0, 0], [0, 0]], [[-2 / 2.5, 2 / 2.5]] * 2]
    np.testing.assert_allclose(group_advantages(REWARDS, group="evidence", std_floor=0.5), expected)


def test_without_scale_only_the_mean_is_taken():
    unscaled = group_advantages(REWARDS, scale=False, std_floor=123.0)
    np.testing.assert_array_equal(unscaled, [[[-1, -1], [1, 1]], [[-2, 2], [-2, 2]]])


@given(hnp.arrays(np.float64, (2, 2, 3), elements=st.sampled_from([0.0, 0.2, 1.0, 1.5])), st.integers(0, 3))
def test_evidence_baseline_cancels_the_feedback_of_the_localization(own, winners):
    feedback = 0.5 * np.array([winners & 1, winners >> 1 & 1])[None, :, None]  # λ·acc(O_i), one number for each i
    for scale in (True, False):
        with_feedback = group_advantages(own + feedback, group="evidence", scale=scale)
        np.testing.assert_allclose(with_feedback, group_advantages(own, group="evidence", scale=scale), atol=1e-9)


def test_pair_baseline_keeps_the_feedback():
    own, feedback = np.zeros((1, 2, 2)), 0.5 * np.array([[[1.0], [0.0]]])
    assert (group_advantages(own + feedback)[0, 0] > 0.9).all()


@pytest.mark.parametrize("winner", [0.35, 1e-6, 1e-12])
def test_one_of_eight_is_bounded(winner):
    """7 against 1: |A| cannot exceed sqrt(n - 1), however small the difference; below the floor it fades."""
    rewards = np.zeros((1, 2, 4))
    rewards[0, 1, 3] = winner
    advantages = group_advantages(rewards, std_floor=1e-4)
    assert np.abs(advantages).max() <= np.sqrt(7)
    std = winner * np.sqrt(7) / 8
    assert advantages.max() == pytest.approx(winner * 7 / 8 / (std + 1e-4), rel=1e-9)
    if winner < 1e-9:
        assert advantages.max() < 1e-7


@given(hnp.arrays(np.float64, (3, 2, 4), elements=st.floats(-10, 10)), st.sampled_from(["pair", "evidence"]))
def test_groups_have_zero_mean_and_bounded_advantages(rewards, group):
    advantages = group_advantages(rewards, group=group)
    axes = (1, 2) if group == "pair" else 2
    np.testing.assert_allclose(advantages.mean(axis=axes), 0, atol=1e-9)
    assert np.abs(advantages).max() <= np.sqrt(7) + 1e-9
    p, i = 1, 1
    own = rewards[p] if group == "pair" else rewards[p, i]
    brute = (rewards[p, i] - sum(own.ravel()) / own.size) / (own.std() + 1e-4)
    np.testing.assert_allclose(advantages[p, i], brute, atol=1e-9)


def test_informative_looks_at_outcomes_of_the_group():
    right = np.array([[[1.0, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]])
    assert informative(right)[:, 0, 0].tolist() == [False, False, True]
    assert informative(right, group="evidence")[..., 0].tolist() == [[False] * 2, [False] * 2, [True, False]]
    # Boxes may be better or worse where all answers are right.
    iou = np.zeros((3, 2, 2))
    iou[0, 1] = 0.3
    assert informative(right, iou)[:, 0, 0].tolist() == [True, False, True]


def test_abstained_outcomes_are_equal():
    nan = np.full((1, 2, 2), np.nan)
    assert not informative(nan).any()


def test_split_signs_by_hand():
    positive, negative = split_signs(np.array([[[1.0, -2.0, 0.5], [-1.0, -1.0, 0.0]]]))
    np.testing.assert_array_equal(positive, [[1.5, 0.0]])
    np.testing.assert_array_equal(negative, [[-2.0, -2.0]])
