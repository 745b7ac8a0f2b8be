"""How sure a figure of several seeds is: intervals over seeds *and* questions, and what a study could have seen.

All seeds answer the same questions, so both are resampled: a resample draws seeds with replacement, and independently
questions, within each data set. An interval over questions alone would say how the same runs would do on other
questions; this one also holds what other runs would do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from vitos.eval.statistics import Interval

POWER = 0.8
_CHUNK = 500  # resamples at once: 500 x questions weights in memory


@dataclass(frozen=True, slots=True)
class SeededInterval(Interval):
    """An estimate over seeds and questions, with what the study could have seen.

    Attributes:
        visible: the smallest true difference from nothing that such a study shows in four of five repetitions, in the
            unit of the scores: (z(0.975) + z(0.8)) standard errors, 2.8 of them at a confidence of 95 %.
        seeds: number of seeds.
    """

    visible: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the interval lies "above" or "below" zero; else "undecided"."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "undecided"


def nested_bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> SeededInterval:
    """Mean over seeds and questions, with a percentile interval of the hierarchical bootstrap.

    With few seeds a bootstrap is far too sure: of S seeds a resample has (S − 1)/S of the variance, and the normal
    quantile is not Student's. So each seed's distance from the mean is first stretched by √(S / (S − 1)) · t / z, with
    S − 1 degrees of freedom (ours). One seed gives an interval over questions.

    Args:
        values: one score, or difference of scores, per seed and question, shape (S, n); nan where it is not defined.
        groups: name of the data set of each question, shape (n,): means of the data sets count alike; None: one set.

    Raises:
        ValueError: for no scores, shapes that do not fit, infinite scores, or arguments out of range.

    >>> two = nested_bootstrap([[1, 0, 1, 1], [1, 1, 1, 0]])
    >>> two.estimate, two.seeds, two.verdict
    (0.75, 2, 'above')
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or np.isnan(scores).all() or np.isinf(scores).any():
        raise ValueError(f"values must hold finite scores of shape (seeds, questions), got shape {scores.shape}")
    names = np.zeros(scores.shape[1]) if groups is None else np.asarray(groups)
    if names.shape != scores.shape[1:]:
        raise ValueError(f"groups must name the data set of all {scores.shape[1]} questions, got shape {names.shape}")
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"samples must be at least 1 and confidence in (0, 1), got {samples} and {confidence}")
    sets = [part for name in np.unique(names) if not np.isnan(part := scores[:, names == name]).all()]
    rng = np.random.default_rng(seed)
    count = len(scores)
    drawn = rng.multinomial(count, [1 / count] * count, size=samples)  # how often each seed: (samples, S)
    tail = (1 - confidence) / 2
    means = np.mean([_resampled(_stretched(part, tail), drawn, rng) for part in sets], axis=0)
    low, high = np.nanquantile(means, [tail, 1 - tail])
    error = float(np.nanstd(means))
    return SeededInterval(
        estimate=float(np.mean([np.nanmean(part) for part in sets])),
        low=float(low),
        high=float(high),
        visible=float(norm.ppf(1 - tail) + norm.ppf(POWER)) * error,
        seeds=count,
    )


def _stretched(scores: NDArray[np.float64], tail: float) -> NDArray[np.float64]:
    count = len(scores)
    if count == 1:
        return scores
    own = np.array([np.nanmean(row) if not np.isnan(row).all() else np.nan for row in scores])
    distance = np.nan_to_num(own - np.nanmean(own))
    factor = np.sqrt(count / (count - 1)) * t.ppf(1 - tail, count - 1) / norm.ppf(1 - tail)
    return np.asarray(scores + (factor - 1) * distance[:, None])


def _resampled(scores: NDArray[np.float64], seeds: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The mean of each resample, shape (samples,); nan where it drew no defined score."""
    known, n = (~np.isnan(scores)).astype(float), scores.shape[1]
    filled, parts = np.nan_to_num(scores), []
    for chunk in np.array_split(seeds, -(-len(seeds) // _CHUNK)):
        questions = rng.multinomial(n, np.full(n, 1 / n), size=len(chunk))  # (chunk, n)
        total, weight = ((chunk @ table * questions).sum(1) for table in (filled, known))
        parts.append(np.divide(total, weight, out=np.full(len(chunk), np.nan), where=weight > 0))
    return np.concatenate(parts)
