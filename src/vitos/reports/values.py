"""Reading figures out of `results.json` and writing them as text: the one place for labels, units and rounding.

Shares and accuracies are fractions 0..1 in the file and per cent in print; differences of accuracies are fractions
in the file and percentage points in print. A figure that is missing, null or not finite prints as a dash.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

DASH = "–"
MINUS = "−"

LABELS = {
    "base_dense": "Base model, all tokens",
    "localization": "Localization branch, all tokens",
    "sparse": "Sparse branch, kept tokens",
    "dense": "Trained model, all tokens",
    "random": "Random tokens",
    "shifted": "Shifted boxes",
    "centre": "Centre tokens",
    "inverted": "Inverted boxes",
    "oracle": "Oracle (gold) boxes",
    "untrained_sparse": "Untrained model, sparse",
    "rl_dense": "RL without pruning, all tokens",
    "text_only": "Trained model, blank image",
    "untrained_text_only": "Untrained model, blank image",
    "untrained_localization": "Untrained localization branch",
    "evidence_head": "Evidence head, its plan",
}
# Conditions that see as many tokens as the sparse branch saw, question by question.
SAME_BUDGET = ("random", "shifted", "centre", "inverted")
CONTROLS = (*SAME_BUDGET, "oracle", "untrained_sparse", "rl_dense", "text_only")

MIN_QUESTIONS = 6
"""Fewest questions that can show a difference: McNemar's exact p is 0.0625 if one model alone is right on all of 5."""
MAX_P = 0.05


class ResultsError(ValueError):
    """A field of the results, cases or metrics does not hold what the schema says."""


class ConfidenceInterval(NamedTuple):
    """A 95% interval; both ends in the unit of the estimate."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether a value lies in the interval, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Accuracy of one condition minus that of another on the same questions, in fractions.

    Attributes:
        num_questions: number of questions that have both, where the results say so.
    """

    estimate: float
    interval: ConfidenceInterval | None = None
    p_value: float | None = None
    num_questions: int | None = None

    @property
    def is_enough(self) -> bool:
        """Whether there are enough questions for a verdict, where their number is known."""
        return self.num_questions is None or self.num_questions >= MIN_QUESTIONS

    @property
    def is_likely_chance(self) -> bool:
        """Whether McNemar's test says that chance is not excluded, where its p is known."""
        return self.p_value is not None and self.p_value >= MAX_P


# --- reading --------------------------------------------------------------------------------------------------------


def number(values: Mapping[str, Any], key: str) -> float | None:
    """`values[key]` as a float; None where it is missing, null or not finite.

    Raises:
        ResultsError: if it is not a number.
    """
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ResultsError(f"field {key!r} must be a number or null, got {value!r}")
    return float(value) if math.isfinite(value) else None


def share(values: Mapping[str, Any], key: str) -> float | None:
    """Like `number`, for a fraction 0..1.

    Raises:
        ResultsError: if it is not a number, or outside 0..1 (per cent where a fraction is due).
    """
    value = number(values, key)
    if value is not None and not 0 <= value <= 1:
        raise ResultsError(f"field {key!r} must be a fraction 0..1, got {value!r}; divide per cent by 100")
    return value


def interval(values: Mapping[str, Any], key: str) -> ConfidenceInterval | None:
    """`values[key]` = [low, high]; None where it, or one of its ends, is missing, null or not finite.

    Raises:
        ResultsError: if it is not a pair of numbers.
    """
    pair = values.get(key)
    if pair is None:
        return None
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ResultsError(f"field {key!r} must be [low, high] or null, got {pair!r}")
    low, high = (number({key: end}, key) for end in pair)
    return None if low is None or high is None else ConfidenceInterval(low, high)


def accuracy(results: Mapping[str, Any], condition: str) -> float | None:
    """Accuracy of a condition of `LABELS` over the whole test set, 0..1 or None."""
    return share(results, f"control_{condition}_accuracy" if condition in CONTROLS else f"{condition}_accuracy")


def condition_name(name: str) -> str:
    """The condition's short name: `control_random_accuracy` → `random`."""
    return name.removeprefix("control_").removesuffix("_accuracy")


def difference(results: Mapping[str, Any], a: str, b: str) -> Difference | None:
    """Accuracy of `a` minus accuracy of `b`, with the interval of `comparisons` where either order is listed there.

    Without a listed comparison it is the plain difference of both accuracies; None where one of them is missing.
    """
    for row in results.get("comparisons") or ():
        pair = (condition_name(row["a"]), condition_name(row["b"]))
        if pair not in ((a, b), (b, a)) or (found := listed_difference(row)) is None:
            continue
        if pair == (a, b):
            return found
        ci = ConfidenceInterval(-found.interval.high, -found.interval.low) if found.interval else None
        return dataclasses.replace(found, estimate=-found.estimate, interval=ci)
    first, second = accuracy(results, a), accuracy(results, b)
    return None if first is None or second is None else Difference(estimate=first - second)


def listed_difference(row: Mapping[str, Any]) -> Difference | None:
    """The difference that a row of `comparisons`, or one like it, holds; None where it is null."""
    estimate = number(row, "difference")
    if estimate is None:
        return None
    ci, p, count = interval(row, "ci"), number(row, "p_value"), row.get("num_questions")
    return Difference(estimate=estimate, interval=ci, p_value=p, num_questions=count)


# --- writing --------------------------------------------------------------------------------------------------------


def label(condition: str) -> str:
    """What a reader sees for a condition; unknown ones keep their name."""
    name = condition_name(condition)
    return LABELS.get(name, name.replace("_", " ").capitalize())


def percent(value: float | None) -> str:
    """0.683 → `68.3%`."""
    return DASH if value is None else f"{100 * value:.1f}%"


def decimal(value: float | None, digits: int = 2) -> str:
    """0.555 → `0.56`."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def points(value: float | None) -> str:
    """A signed difference in percentage points: 0.051 → `+5.1`."""
    if value is None:
        return DASH
    text = f"{100 * value:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def percent_interval(ends: Sequence[float] | None) -> str:
    """(0.2, 0.31) → `20.0% to 31.0%`."""
    return DASH if ends is None else " to ".join(map(percent, ends))


def points_interval(ends: Sequence[float] | None) -> str:
    """(-0.01, 0.04) → `−1.0 to +4.0`."""
    return DASH if ends is None else " to ".join(map(points, ends))


def p_value(value: float | None) -> str:
    """0.0312 → `p = 0.031`."""
    if value is None:
        return DASH
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def markdown_line(text: str) -> str:
    """One line of Markdown text in which untrusted names cannot start an HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))


def seconds(value: float | None) -> str:
    """Three significant figures, in the unit that reads best: `1.23 s`, `45.6 ms`."""
    if value is None:
        return DASH
    return f"{1000 * value:.3g} ms" if 0 < value < 0.1 else f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
