"""Intervals over seeds and questions: by all resamples, by simulated studies, and against the plain bootstrap."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from vitos.eval.seeds import _resampled, nested_bootstrap
from vitos.eval.statistics import bootstrap_mean


def test_every_resample_of_a_small_study():
    """Two seeds, three questions: the means of all 2² × 3³ equally likely resamples, and their shares."""
    scores = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 0.0]])
    expected = []
    for seeds in product(range(2), repeat=2):
        for questions in product(range(3), repeat=3):
            drawn = scores[list(seeds)][:, list(questions)]
            expected.append(np.nan if np.isnan(drawn).all() else np.nanmean(drawn))
    rng = np.random.default_rng(0)
    found = _resampled(scores, rng.multinomial(2, [0.5, 0.5], size=40_000), rng)
    assert np.isnan(found).mean() == pytest.approx(np.isnan(expected).mean(), abs=0.005)
    for value in sorted({round(x, 9) for x in expected if not np.isnan(x)}):
        share = np.isclose(expected, value).mean()
        assert np.isclose(found, value).mean() == pytest.approx(share, abs=0.01), value


def test_one_seed_is_the_bootstrap_over_questions():
    scores = np.random.default_rng(2).normal(0.1, 1, 300)
    found, plain = nested_bootstrap([scores]), bootstrap_mean(scores)
    assert found.estimate == pytest.approx(plain.estimate)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    error = scores.std() / np.sqrt(300)
    assert found.visible == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * error, rel=0.05)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.1), (5, 0.1), (5, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, spread):
    """Studies whose seeds differ by chance, or not at all; intervals over questions alone miss the truth of most."""
    rng = np.random.default_rng(seeds)
    studies, held, plain = 120, 0, 0
    for study in range(studies):
        own = rng.normal(0, spread, (seeds, 1))
        scores = own + rng.normal(0, 0.3, (seeds, 100))
        found = nested_bootstrap(scores, samples=200, seed=study)
        held += found.low <= 0 <= found.high
        alone = bootstrap_mean(scores.mean(0), samples=200)
        plain += alone.low <= 0 <= alone.high
    assert held / studies > 0.88
    assert not spread or plain / studies < 0.5


def test_a_visible_difference_is_seen_in_four_of_five_studies():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 0.4, (1, 250))
    visible = nested_bootstrap(first, samples=2000).visible
    seen = [nested_bootstrap(visible + rng.normal(0, 0.4, (1, 250)), samples=200).verdict for _ in range(120)]
    assert seen.count("above") / 120 == pytest.approx(0.8, abs=0.1)
    assert "below" not in seen


def test_data_sets_count_alike_and_are_resampled_within():
    scores = np.concatenate([np.ones((2, 90)), np.zeros((2, 10))], axis=1)
    names = ["large"] * 90 + ["small"] * 10
    found = nested_bootstrap(scores, names)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)
    assert nested_bootstrap(scores).estimate == pytest.approx(0.9)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 1000))
def test_bounds_and_order(seeds, questions, seed):
    rng = np.random.default_rng(seed)
    scores = (rng.random((seeds, questions)) < 0.5).astype(float)
    found = nested_bootstrap(scores, samples=200)
    again = nested_bootstrap(scores[rng.permutation(seeds)], samples=200)
    assert found.low - 1e-9 <= found.estimate <= found.high + 1e-9 or questions < 8
    assert found.estimate == pytest.approx(again.estimate)
    assert found.visible >= 0


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ([1, 0], {}, r"shape \(seeds, questions\)"),
        ([[np.nan, np.nan]], {}, "finite scores"),
        ([[1.0, np.inf]], {}, "finite scores"),
        ([[1.0, 0.0]], {"groups": ["a"]}, "data set of all 2 questions"),
        ([[1.0, 0.0]], {"samples": 0}, "samples must be at least 1"),
    ],
)
def test_wrong_scores(values, changes, message):
    with pytest.raises(ValueError, match=message):
        nested_bootstrap(values, **changes)
