"""How sure a reported number is: intervals over questions, and the exact McNemar test.

Two models that answer the same questions are compared question by question: a resample of the bootstrap draws whole
questions, with both models' scores, so what is hard for both cancels. Its intervals are percentile intervals, and
depend on the seed and the scores only, not on the order of the questions.

The bootstrap knows no question but those it has. From few questions it is too sure of itself, and where all scores or
differences are alike its interval has no width. So right-or-wrong scores have exact intervals there, made of Clopper
and Pearson's for a proportion (Biometrika 26, 1934); the compositions are ours. An exact interval of a difference or
ratio excludes "no difference" exactly if McNemar's exact p is below 1 − confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

FloatArray = NDArray[np.float64]

FEW_QUESTIONS = 100
"""Below this number of questions, right-or-wrong scores have exact intervals instead of the bootstrap's."""

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
    """Mean over questions with its interval: exact for few or like scores of 0 and 1, else the bootstrap's.

    Args:
        values: one score per question, finite, shape (n,), n >= 1.
        samples: number of resamples.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: for scores that are empty, not one-dimensional or not finite, or arguments out of range.

    >>> round(bootstrap_mean([1] * 20).low, 3)
    0.832
    """
    scores = _scores(values, "values")
    interval = _bootstrap(scores, samples, confidence, seed)
    if _is_binary(scores) and (len(scores) < FEW_QUESTIONS or _is_constant(scores)):
        return Interval(interval.estimate, *_proportion(int(scores.sum()), len(scores), confidence))
    return interval


def paired_bootstrap_difference(
    a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) − mean(b) over the same questions, with its interval: exact for few or like differences of 0 and 1.

    The exact interval is that of (2π − 1)·θ, where θ is the share of questions that one model alone answers right, and
    π is the first model's part of them. Both run over their Clopper-Pearson intervals, so it is rather too wide.

    Args:
        a, b: scores of two models, entry i of both for question i; finite, shape (n,), n >= 1.

    Raises:
        ValueError: as `bootstrap_mean`, or if the lengths differ.
    """
    first, second = _paired(a, b, "a", "b")
    interval = _bootstrap(first - second, samples, confidence, seed)
    if not _is_binary(first, second) or not (len(first) < FEW_QUESTIONS or _is_constant(first - second)):
        return interval
    pairs = _Pairs.of(first, second)
    share = _proportion(pairs.unequal, pairs.count, confidence)
    low, high = (2 * part - 1 for part in pairs.first_part(confidence))
    return Interval(interval.estimate, low * share[low < 0], high * share[high > 0])


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

    With several data sets it is the ratio of the averages (docs/method.md, section 11): the means of the data sets are
    averaged with equal weights for each model, then divided. Questions are resampled within their data set. The exact
    interval, for few or like right-or-wrong scores of one data set, is made as that of the difference.

    Args:
        numerator, denominator: scores >= 0, entry i of both for question i; shape (n,), n >= 1.
        groups: name of the data set of each question, shape (n,); None for a single one.

    Returns:
        All nan if the denominators average 0. If those of some resample do (few questions, hardly any right), the
        ratio has no upper bound that the data could show: the estimate is given and both ends are nan.

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
    interval = _interval(ratio, resampled[:, 0] / resampled[:, 1], confidence)
    single = len(sets) == 1
    if not _is_binary(rows) or not (interval.low == interval.high or (single and len(rows) < FEW_QUESTIONS)):
        return interval
    return Interval(ratio, *(_exact_ratio(sets[0], confidence) if single else _unseen_ratio(sets, confidence)))


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


# --- exact intervals of right-or-wrong scores -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """Numbers of questions that both models, one alone or none answers right."""

    both: int
    first: int
    second: int
    count: int

    @classmethod
    def of(cls, first: FloatArray, second: FloatArray) -> _Pairs:
        both = int((first * second).sum())
        return cls(both=both, first=int(first.sum()) - both, second=int(second.sum()) - both, count=len(first))

    @property
    def unequal(self) -> int:
        return self.first + self.second

    def first_part(self, confidence: float) -> tuple[float, float]:
        """The first model's part of the unequal ones; anything where there is none."""
        return _proportion(self.first, self.unequal, confidence) if self.unequal else (0.0, 1.0)


def _proportion(successes: int, count: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's interval."""
    found = binomtest(successes, count).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def _exact_ratio(rows: FloatArray, confidence: float) -> tuple[float, float]:
    """Of the questions that any model answers right, let λ be the share that both do: the ratio is
    (λ + (1 − λ)π) / (λ + (1 − λ)(1 − π)), with π as for the difference.
    """
    pairs = _Pairs.of(rows[:, 0], rows[:, 1])
    few, many = _proportion(pairs.both, pairs.both + pairs.unequal, confidence)

    def ratio(both: float, part: float) -> float:
        return (both + (1 - both) * part) / (both + (1 - both) * (1 - part))

    low, high = pairs.first_part(confidence)
    return ratio(few if low < 0.5 else many, low), ratio(few if high > 0.5 else many, high)


def _unseen_ratio(sets: list[FloatArray], confidence: float) -> tuple[float, float]:
    """Where no resample of several data sets differs: the ends if those questions that were not seen, up to a share of
    1 − (tail)^(1/n) in each data set, fell to one model alone.
    """
    unseen = np.array([_proportion(0, len(part), confidence)[1] for part in sets])
    means = np.array([part.mean(axis=0) for part in sets])
    first, second = ((1 - unseen) * means[:, axis] for axis in (0, 1))
    return (
        float(first.mean() / (second + unseen).mean()),
        float((first + unseen).mean() / second.mean()),
    )


def _is_binary(*scores: FloatArray) -> bool:
    return all(bool(((values == 0) | (values == 1)).all()) for values in scores)


def _is_constant(scores: FloatArray) -> bool:
    return bool((scores == scores[0]).all())


# --- the bootstrap --------------------------------------------------------------------------------------------------


def _bootstrap(scores: FloatArray, samples: int, confidence: float, seed: int) -> Interval:
    means = _resampled_means(scores[:, None], samples, np.random.default_rng(seed))[:, 0]
    return _interval(float(scores.mean()), means, confidence)


def _resampled_means(rows: FloatArray, samples: int, rng: np.random.Generator) -> FloatArray:
    """Means of `samples` draws with replacement of the n rows; (n, k) → (samples, k)."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    n = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    rows = np.repeat(distinct, counts, axis=0)  # sorted: the order of the questions does not count
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
