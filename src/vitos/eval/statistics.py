"""How sure a reported number is: bootstrap intervals over questions, and the exact McNemar test.

Two models that answer the same questions are compared question by question: a resample draws whole questions, with
both models' scores, so what is hard for both cancels. All intervals are percentile intervals of the bootstrap
distribution, and depend on the seed and the scores only, not on the order of the questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

FloatArray = NDArray[np.float64]

# Question draws held in memory at once by the general path: 8 MiB of indices.
_CHUNK = 1 << 20
# Up to this many distinct rows of scores, resamples are drawn as counts of those rows.
_FEW_DISTINCT = 64


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval, in the unit of the scores; nan where it is not defined."""

    estimate: float
    low: float
    high: float


def bootstrap_mean(values: ArrayLike, *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean over questions with its percentile interval.

    Args:
        values: one score per question, finite, shape (n,), n >= 1.
        samples: number of resamples.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: for scores that are empty, not one-dimensional or not finite, or arguments out of range.
    """
    scores = _scores(values, "values")
    means = _resampled_means(scores[:, None], samples, np.random.default_rng(seed))[:, 0]
    return _interval(float(scores.mean()), means, confidence)


def paired_bootstrap_difference(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) − mean(b) over the same questions, with its percentile interval.

    Args:
        a, b: scores of two models, entry i of both for question i; finite, shape (n,), n >= 1.

    Raises:
        ValueError: as `bootstrap_mean`, or if the lengths differ.
    """
    first, second = _paired(a, b, "a", "b")
    return bootstrap_mean(first - second, samples=samples, confidence=confidence, seed=seed)


def paired_bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Relative performance: mean score of one model ÷ mean score of another over the same questions.

    With several data sets it is the ratio of the averages (algorithm.md §9): the means of the data sets are averaged
    with equal weights for each model, then divided. Questions are resampled within their data set.

    Args:
        numerator, denominator: scores >= 0, entry i of both for question i; shape (n,), n >= 1.
        groups: name of every question's data set, shape (n,); None for a single one.

    Returns:
        All nan if the denominators average 0. If some resample's do (few questions, hardly any right), the ratio has
        no upper bound that the data could show: the estimate is given and both ends are nan.

    Raises:
        ValueError: as `bootstrap_mean`, or if the lengths differ or a score is negative.
    """
    rows = np.stack(_paired(numerator, denominator, "numerator", "denominator"), axis=1)
    if rows.min() < 0:
        raise ValueError("a ratio needs scores >= 0, got a negative one in numerator or denominator")
    names = np.zeros(len(rows), dtype=int) if groups is None else np.asarray(groups)
    if names.shape != (len(rows),):
        raise ValueError(f"groups must name the data set of all {len(rows)} questions, got shape {names.shape}")
    sets = [rows[names == name] for name in np.unique(names)]
    rng = np.random.default_rng(seed)
    estimate = np.mean([part.mean(0) for part in sets], axis=0)
    resampled = np.mean([_resampled_means(part, samples, rng) for part in sets], axis=0)
    if estimate[1] == 0:
        return Interval(math.nan, math.nan, math.nan)
    ratio = float(estimate[0] / estimate[1])
    if not resampled[:, 1].all():
        return Interval(ratio, math.nan, math.nan)
    return _interval(ratio, resampled[:, 0] / resampled[:, 1], confidence)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided p-value that two models answer the same questions equally well.

    Only questions that one model alone answers right count; under the hypothesis each falls to either model with
    probability 1/2. 1 if there is none.

    Args:
        a, b: 0 or 1 (or bool), entry i of both for question i; shape (n,), n >= 1.

    Raises:
        ValueError: if the lengths differ or a score is not 0 or 1.
    """
    first, second = _paired(a, b, "a", "b")
    if not np.isin([first, second], (0, 1)).all():
        raise ValueError("McNemar's test compares right and wrong answers: every score must be 0 or 1")
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def _resampled_means(rows: FloatArray, samples: int, rng: np.random.Generator) -> FloatArray:
    """Means of `samples` draws with replacement of the n rows; (n, k) → (samples, k)."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    n = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    rows = np.repeat(distinct, counts, axis=0)  # the same rows in an order of their own
    if len(distinct) <= _FEW_DISTINCT:
        # Right and wrong answers: how often each distinct row is drawn has the same distribution, at no cost in n.
        return rng.multinomial(n, counts / n, size=samples) @ distinct / n
    step = max(1, _CHUNK // n)
    chunks = (min(step, samples - start) for start in range(0, samples, step))
    return np.concatenate([rows[rng.integers(n, size=(chunk, n))].mean(axis=1) for chunk in chunks])


def _interval(estimate: float, resampled: FloatArray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _scores(values: ArrayLike, name: str) -> FloatArray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must hold one score for each of at least one question, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"{name}[{index}] is {scores[index]}; leave out questions without a score")
    return scores


def _paired(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[FloatArray, FloatArray]:
    first, second = _scores(a, name_a), _scores(b, name_b)
    if len(first) != len(second):
        raise ValueError(f"{name_a} and {name_b} must score the same questions, got {len(first)} and {len(second)}")
    return first, second
