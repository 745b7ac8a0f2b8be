"""What an evaluation showed, in plain sentences computed from its figures.

A claim is made only where its 95 % interval excludes "no difference"; otherwise the sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitos.reports import values as v

# From this share on, a random choice of tokens costs so little that the controls can hardly differ (algorithm.md §9).
LARGE_BUDGET = 0.7

NAMES = {
    "random": "randomly chosen tokens",
    "centre": "tokens around the centre",
    "inverted": "tokens outside the boxes",
    "oracle": "tokens in the gold boxes",
    "untrained_sparse": "the untrained model's own boxes",
    "rl_dense": "the same training without pruning",
}


def summary(results: Mapping[str, Any]) -> list[str]:
    """Short paragraphs: what was measured, relative performance, controls, boxes, time; without what is unknown."""
    parts = (_measured(results), _relative(results), _controls(results), _boxes(results), _time(results))
    return [part for part in parts if part]


def _measured(results: Mapping[str, Any]) -> str:
    count, dataset = results.get("num_questions"), results.get("dataset")
    base, sparse = v.accuracy(results, "base_dense"), v.accuracy(results, "sparse")
    kept = v.share(results, "kept_ratio")
    where = f"On {'the' if count is None else f'{count:,}'} questions of {dataset or 'the test set'}"
    return (
        f"{where}, the base model answered {v.percent(base)} correctly with all visual tokens. After training, the "
        f"sparse branch answered {v.percent(sparse)} while seeing {v.percent(kept)} of the visual tokens on average."
    )


def _relative(results: Mapping[str, Any]) -> str:
    value, ci = v.number(results, "relative_performance"), v.interval(results, "relative_performance_ci")
    if value is None:
        return ""
    text = f"Relative performance (sparse ÷ base) is {v.percent(value)}"
    if ci is None:
        return f"{text}; no interval was computed, so chance is not excluded."
    text += f" with a 95% interval of {v.percent_interval(ci)}"
    if ci.contains(1):
        return f"{text}. The interval contains 100%: a difference from the base model is not shown."
    return f"{text}: the sparse branch is {'better' if ci.low > 1 else 'worse'} than the base model on this test set."


def _controls(results: Mapping[str, Any]) -> str:
    sentences = [s for c in v.CONTROLS if (s := _control(results, c))]
    if not sentences:
        return "No control was run, so it is unknown whether the choice of tokens matters."
    random = v.difference(results, "sparse", "random")
    if random is None:
        sentences.append("Without the random control it is unknown whether the choice of tokens matters.")
    elif random.interval is not None and random.interval.low <= 0:
        sentences.append("This run therefore does not show that choosing tokens by boxes beats choosing at random.")
    kept = v.share(results, "kept_ratio")
    if kept is not None and kept >= LARGE_BUDGET:
        sentences.append(
            f"With {v.percent(kept)} of the tokens kept, even a random choice loses little; "
            "smaller budgets tell more about the choice."
        )
    return " ".join(sentences)


def _control(results: Mapping[str, Any], control: str) -> str:
    gap = v.difference(results, "sparse", control)
    if gap is None:
        return ""
    budget = "At the same budget, against" if control in v.SAME_BUDGET else "Against"
    text = f"{budget} {NAMES[control]}, the sparse branch"
    size = f"{v.points(abs(gap.estimate)).lstrip('+')} points"
    direction = "higher" if gap.estimate > 0 else "lower"
    if gap.interval is None:
        return f"{text} is {size} {direction}; no interval was computed."
    span = v.points_interval(gap.interval)
    if gap.interval.contains(0):
        return f"{text} shows no clear difference: {v.points(gap.estimate)} points, interval {span} contains 0."
    return f"{text} is {size} {direction} (interval {span})."


def _boxes(results: Mapping[str, Any]) -> str:
    after, before = v.share(results, "mean_iou"), v.share(results, "mean_iou_before")
    fallback, parsed = v.share(results, "fallback_rate"), v.share(results, "parse_rate")
    sentences = []
    if after is not None:
        change = "" if before is None else f", {v.decimal(before)} before training"
        sentences.append(f"The boxes overlap the gold boxes with a mean IoU of {v.decimal(after)}{change}.")
    if parsed is not None:
        sentences.append(f"{v.percent(parsed)} of the box lists could be parsed.")
    if fallback is not None:
        sentences.append(f"On {v.percent(fallback)} of the questions the sparse branch fell back to all tokens.")
    return " ".join(sentences)


def _time(results: Mapping[str, Any]) -> str:
    times = results.get("seconds_by_stage") or {}
    total, dense = v.number(times, "total"), v.number(times, "dense_total")
    if total is None or not dense:
        return ""
    return (
        f"Localizing and reasoning together took {v.seconds(total)}, {total / dense:.2f} times the "
        f"{v.seconds(dense)} of one dense pass in the same engine."
    )
