"""What two conditions say about the same questions: the figures of `vitos eval` and of `vitos bench`.

A score is 1 for a right answer and 0 for a wrong or missing one; nan where a condition has no answer to a question.
Only questions that both conditions have are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.eval.statistics import mcnemar, paired_bootstrap_difference, paired_bootstrap_ratio

Floats = NDArray[np.float64]


def mean(values: Floats) -> float | None:
    """The mean of what is not nan; None if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def relative(
    scores: Floats, base: Floats, sets: Sequence[str] | NDArray[np.str_], samples: int, seed: int
) -> tuple[float | None, list[float] | None]:
    """Accuracy ÷ the base's accuracy, with its interval; over several data sets the ratio of their averages.

    Args:
        sets: name of each question's data set, shape (n,).

    Returns:
        No ratio if the base has no answer right. No interval if some resample of the base has none: with so few right
        answers the ratio has no upper bound.
    """
    both = ~(np.isnan(scores) | np.isnan(base))
    if not both.any() or base[both].sum() == 0:
        return None, None
    ratio = paired_bootstrap_ratio(scores[both], base[both], np.asarray(sets)[both], samples=samples, seed=seed)
    return ratio.estimate, None if np.isnan(ratio.high) else [ratio.low, ratio.high]


def difference(a: Floats, b: Floats, samples: int, seed: int) -> dict[str, Any] | None:
    """Accuracy of a − accuracy of b, each question counted alike; None if they have no question in common."""
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return None
    interval = paired_bootstrap_difference(a[both], b[both], samples=samples, seed=seed)
    return {
        "num_questions": int(both.sum()),
        "difference": interval.estimate,
        "ci": [interval.low, interval.high],
        "p_value": mcnemar(a[both], b[both]),
    }
