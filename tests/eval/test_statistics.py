import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from vitos.eval import statistics
from vitos.eval.statistics import (
    Interval,
    bootstrap_mean,
    mcnemar,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
)


@pytest.fixture(params=["counts of distinct rows", "general"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of resampling, the general one in several chunks, for few questions too."""
    monkeypatch.setattr(statistics, "FEW_QUESTIONS", 0)
    if request.param == "general":
        monkeypatch.setattr(statistics, "_FEW_DISTINCT", 0)
        monkeypatch.setattr(statistics, "_CHUNK", 997)


def resamples(n: int) -> np.ndarray:
    """Every one of the n**n equally likely draws."""
    return np.array(list(itertools.product(range(n), repeat=n)))


def assert_close(interval: Interval, low: float, high: float, share: float = 0.03) -> None:
    """Both ends agree to `share` of the width: the noise of 20,000 resamples is about a third of that."""
    np.testing.assert_allclose([interval.low, interval.high], [low, high], atol=share * (high - low))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.97])
def test_mean_equals_the_quantiles_of_all_resamples(confidence: float) -> None:
    values = np.array([0, 1, 1, 0, 1])
    tail = (1 - confidence) / 2
    # method="lower": no interpolation across a step of the exact distribution; none of its steps is near a tail.
    low, high = np.quantile(values[resamples(5)].mean(1), [tail, 1 - tail], method="lower")
    assert bootstrap_mean(values, confidence=confidence) == Interval(0.6, pytest.approx(low), pytest.approx(high))


@pytest.mark.usefixtures("path")
def test_grouped_ratio_equals_the_quantiles_of_all_resamples() -> None:
    numerator = [0.9, 0.3, 0.55, 0.2, 0.8, 0.65, 0.4]
    denominator = [0.5, 0.41, 0.75, 0.3, 0.6, 0.2, 0.72]
    rows = np.stack([numerator, denominator], axis=1)
    first, second = rows[:3][resamples(3)].mean(1), rows[3:][resamples(4)].mean(1)
    averages = (first[:, None] + second[None]) / 2
    exact = (averages[..., 0] / averages[..., 1]).ravel()
    for confidence in (0.5, 0.8, 0.95):
        tail, noise = (1 - confidence) / 2, 0.012  # four standard errors of a quantile's rank
        interval = paired_bootstrap_ratio(
            numerator, denominator, ["a"] * 3 + ["b"] * 4, samples=20_000, confidence=confidence
        )
        for end, rank in ((interval.low, tail), (interval.high, 1 - tail)):
            assert np.quantile(exact, rank - noise) <= end <= np.quantile(exact, rank + noise)


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_agree_with_scipy(binary: bool) -> None:
    rng = np.random.default_rng(3)
    b = rng.random(200)
    a = 0.7 * b + 0.4 * rng.random(200)
    if binary:
        a, b = a > 0.4, b > 0.5
    kwargs = {"n_resamples": 20_000, "method": "percentile", "vectorized": True, "random_state": 4}

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis) - y.mean(axis)

    def ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis) / y.mean(axis)

    expected = stats.bootstrap((a, b), difference, paired=True, **kwargs).confidence_interval
    assert_close(paired_bootstrap_difference(a, b, samples=20_000), *expected)
    expected = stats.bootstrap((a, b), ratio, paired=True, **kwargs).confidence_interval
    assert_close(paired_bootstrap_ratio(a, b, samples=20_000), *expected)
    expected = stats.bootstrap((a,), np.mean, **kwargs).confidence_interval
    assert_close(bootstrap_mean(a, samples=20_000), *expected)


def test_the_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        ability = rng.random(120)  # shared by both models, so the pairs are correlated
        a, b = rng.random(120) < 0.2 + 0.6 * ability, rng.random(120) < 0.1 + 0.6 * ability
        interval = paired_bootstrap_difference(a, b, samples=500, seed=seed)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.915 <= covered / 400 <= 0.98


def test_pairs_are_kept_together() -> None:
    scores = np.random.default_rng(0).random(90)
    np.testing.assert_allclose(
        list(as_tuple(paired_bootstrap_difference(scores + 0.25, scores))), [0.25, 0.25, 0.25], atol=1e-12
    )
    np.testing.assert_allclose(list(as_tuple(paired_bootstrap_ratio(2 * scores, scores))), [2, 2, 2], atol=1e-12)


def test_several_data_sets_give_the_ratio_of_the_averages() -> None:
    # a: 2 of 4 against 1 of 4; b: 2 of 2 against 2 of 2. Mean of ratios 1.5, pooled 4/3, ratio of averages 1.2.
    numerator, denominator = [1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]
    interval = paired_bootstrap_ratio(numerator, denominator, ["a", "a", "a", "a", "b", "b"])
    assert interval.estimate == pytest.approx(1.2)
    # Set b has no variance and is resampled within itself, so its average stays 1: the ratio cannot pass 2.
    assert 1 <= interval.low < 1.2 < interval.high <= 2
    assert paired_bootstrap_ratio(numerator, denominator).estimate == pytest.approx(4 / 3)


def test_a_ratio_to_nothing_is_nan() -> None:
    assert all(math.isnan(v) for v in as_tuple(paired_bootstrap_ratio([1, 0, 1], [0, 0, 0])))
    few = paired_bootstrap_ratio([1, 1, 1, 0], [1, 0, 0, 0])
    assert few.estimate == 3
    assert math.isnan(few.low)
    assert math.isnan(few.high)


@pytest.mark.parametrize("binary", [True, False])
def test_only_seed_and_scores_matter_not_the_order(binary: bool) -> None:
    rng = np.random.default_rng(1)
    a, b, groups = rng.random(150), rng.random(150), rng.choice(["x", "y"], 150)
    if binary:
        a, b = a.round(), b.round()
    order = rng.permutation(150)
    here = paired_bootstrap_ratio(a, b, groups, samples=300, seed=7)
    there = paired_bootstrap_ratio(a[order], b[order], groups[order], samples=300, seed=7)
    np.testing.assert_allclose(as_tuple(here), as_tuple(there), rtol=1e-12)
    assert here == paired_bootstrap_ratio(a, b, groups, samples=300, seed=7)
    assert here != paired_bootstrap_ratio(a, b, groups, samples=300, seed=8)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random(100)
    whole = bootstrap_mean(values, samples=501)
    monkeypatch.setattr(statistics, "_CHUNK", 250)
    assert bootstrap_mean(values, samples=501) == whole


def test_mcnemar_sums_the_binomial_tails() -> None:
    for only_a, only_b in itertools.product(range(9), repeat=2):
        a = [1] * only_a + [0] * only_b + [1, 1, 0]
        b = [0] * only_a + [1] * only_b + [1, 1, 0]
        n, smaller = only_a + only_b, min(only_a, only_b)
        tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
        assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar([True] * 8 + [False], [False] * 8 + [True]) == pytest.approx(20 / 512)


def tables(largest: int) -> Iterator[tuple[list[int], list[int]]]:
    """Scores of two models for every way in which up to `largest` questions can come out."""
    for n in range(1, largest + 1):
        for both, only_a, only_b in itertools.product(range(n + 1), repeat=3):
            none = n - both - only_a - only_b
            if none >= 0:
                yield (
                    [1] * (both + only_a) + [0] * (only_b + none),
                    [1] * both + [0] * only_a + [1] * only_b + [0] * none,
                )


def test_exact_intervals_never_contradict_mcnemar_and_always_have_a_width() -> None:
    for a, b in tables(10):
        significant = mcnemar(a, b) < 0.05
        difference = paired_bootstrap_difference(a, b, samples=10)
        assert (not difference.low <= 0 <= difference.high) == significant, (a, b)
        assert -1 <= difference.low <= difference.estimate <= difference.high <= 1
        assert difference.low < difference.high
        ratio = paired_bootstrap_ratio(a, b, samples=100)
        if not math.isnan(ratio.low):
            assert (not ratio.low <= 1 <= ratio.high) == significant, (a, b)
            assert ratio.low <= ratio.estimate <= ratio.high
            assert ratio.low < ratio.high


def test_two_right_answers_show_next_to_nothing() -> None:
    """Two questions that one model alone answers right: once [100, 100], with p = 0.5 in the same row."""
    assert as_tuple(bootstrap_mean([1, 1])) == pytest.approx((1, 0.025**0.5, 1))
    difference = paired_bootstrap_difference([1, 1], [0, 0])
    assert as_tuple(difference) == pytest.approx((1, 2 * 0.025**0.5 - 1, 1))
    # Four of eight alone: once +12.5 to +87.5 with p = 0.125.
    four = paired_bootstrap_difference([1] * 4 + [0] * 4, [0] * 8)
    assert four.low < 0 < four.estimate < four.high < 1


@pytest.mark.parametrize("n", [1, 2, 7, 99, 100, 600])
@pytest.mark.parametrize("right", [0, 1])
def test_scores_that_are_all_alike_have_the_interval_of_clopper_and_pearson(n: int, right: int) -> None:
    """Its end is the share at which n like answers in a row have the probability of the tail."""
    edge = 0.025 ** (1 / n)
    low, high = (edge, 1) if right else (0, 1 - edge)
    assert as_tuple(bootstrap_mean([right] * n)) == pytest.approx((right, low, high))
    same = paired_bootstrap_difference([right] * n, [right] * n)
    assert as_tuple(same) == pytest.approx((0, edge - 1, 1 - edge))
    if right:
        ratio = paired_bootstrap_ratio([1] * n, [1] * n)
        assert as_tuple(ratio) == pytest.approx((1, edge, 1 / edge))
        several = paired_bootstrap_ratio([1] * 2 * n, [1] * 2 * n, ["a", "b"] * n)
        assert several.low == pytest.approx(edge)
        assert several.high == pytest.approx(1 / edge)


@pytest.mark.parametrize("n", [5, 20, 60])
@pytest.mark.parametrize("chances", [(0.5, 0.2, 0.1), (0.7, 0.02, 0.02), (0.2, 0.5, 0.0), (0.9, 0.05, 0.05)])
def test_exact_intervals_cover_the_truth(n: int, chances: tuple[float, float, float]) -> None:
    """At least as often as they say, over 300 draws of n questions."""
    both, only_a, only_b = chances
    covered = {"mean": 0, "difference": 0, "ratio": 0}

    @functools.cache  # exact intervals depend on the four counts alone
    def intervals(*counts: int) -> tuple[Interval, Interval, Interval]:
        kind = np.repeat(range(4), counts)
        a, b = kind <= 1, (kind == 0) | (kind == 2)
        ratio = paired_bootstrap_ratio(a, b, samples=10)
        return bootstrap_mean(a, samples=10), paired_bootstrap_difference(a, b, samples=10), ratio

    shares = [both, only_a, only_b, max(0.0, 1 - sum(chances))]
    for counts in np.random.default_rng(n).multinomial(n, shares, size=300).tolist():
        mean, difference, ratio = intervals(*counts)
        covered["mean"] += mean.low <= both + only_a <= mean.high
        covered["difference"] += difference.low <= only_a - only_b <= difference.high
        covered["ratio"] += math.isnan(ratio.low) or ratio.low <= (both + only_a) / (both + only_b) <= ratio.high
    assert min(covered.values()) >= 0.93 * 300


@pytest.mark.parametrize("n", [100, 250])
def test_many_questions_have_the_percentile_interval_of_the_bootstrap(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.random(n) < 0.7, rng.random(n) < 0.6
    counts = [int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum())]
    draws = np.random.default_rng(1).multinomial(n, np.array(counts) / n, size=40_000)
    right_a, right_b = draws[:, :2].sum(1), draws[:, [0, 2]].sum(1)
    for interval, resampled in (
        (bootstrap_mean(a, samples=40_000), right_a / n),
        (paired_bootstrap_difference(a, b, samples=40_000), (right_a - right_b) / n),
        (paired_bootstrap_ratio(a, b, samples=40_000), right_a / right_b),
    ):
        assert_close(interval, *np.quantile(resampled, [0.025, 0.975]), share=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "at least one question"),
        (lambda: bootstrap_mean([[1.0]]), r"shape \(1, 1\)"),
        (lambda: bootstrap_mean([1.0, math.nan]), r"values\[1\] is nan"),
        (lambda: bootstrap_mean([1.0], samples=0), "samples"),
        (lambda: bootstrap_mean([1.0], confidence=95), "confidence"),
        (lambda: paired_bootstrap_difference([1, 0], [1]), "same questions, got 2 and 1"),
        (lambda: paired_bootstrap_ratio([1, -1], [1, 1]), "scores >= 0"),
        (lambda: paired_bootstrap_ratio([1, 1], [1, 1], ["a"]), "groups"),
        (lambda: mcnemar([0.5], [1]), "0 or 1"),
        (lambda: mcnemar([1], [1, 0]), "same questions"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def as_tuple(interval: Interval) -> tuple[float, float, float]:
    return (interval.estimate, interval.low, interval.high)
