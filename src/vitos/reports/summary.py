"""What an evaluation showed, in plain sentences computed from its figures.

A claim is made only where its 95 % interval excludes "no difference", McNemar's exact p is below 0.05, and there are
questions enough for either; otherwise the sentence says why not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitos.reports import values as v

# From this share of kept tokens on, a random choice loses so little that the controls can hardly differ: see
# "Controls" in docs/results.md.
LARGE_BUDGET = 0.7

NAMES = {
    "random": "randomly chosen tokens",
    "shifted": "its own boxes moved elsewhere",
    "centre": "tokens around the centre",
    "inverted": "tokens outside its boxes",
    "oracle": "the tokens of the gold boxes",
    "untrained_sparse": "the model before training with its own boxes",
    "rl_dense": "the same training without pruning",
    "text_only": "a blank image",
    "dense": "the trained model with all tokens",
    "evidence_head": "the same model by its evidence head",
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
    answered = (
        f"the sparse branch answered {v.percent(sparse)} correctly and saw {v.percent(kept)} of the visual tokens"
    )
    if base is None:
        return f"{where}, {answered} on average. There is no base model to compare it with."
    return (
        f"{where}, the base model answered {v.percent(base)} correctly with all visual tokens. After training, "
        f"{answered} on average."
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
    gap = v.difference(results, "sparse", "base_dense") or v.Difference(estimate=0.0)
    count = v.number(results, "num_questions")
    if not gap.is_enough or (count is not None and count < v.MIN_QUESTIONS):
        return f"{text}. With fewer than {v.MIN_QUESTIONS} questions, a difference from the base model is not shown."
    if gap.is_likely_chance:
        return f"{text}. But {v.p_value(gap.p_value)} (McNemar): a difference from the base model is not shown."
    return f"{text}: the sparse branch is {'better' if ci.low > 1 else 'worse'} than the base model on this test set."


def _controls(results: Mapping[str, Any]) -> str:
    gaps = {c: gap for c in NAMES if (gap := v.difference(results, "sparse", c)) is not None}
    if not gaps:
        return "No control was run, so it is unknown whether the choice of tokens matters."
    count = v.number(results, "num_questions")
    few = count is not None and count < v.MIN_QUESTIONS
    groups: dict[str, list[str]] = {}
    for control, gap in gaps.items():
        groups.setdefault(_verdict(gap, few), []).append(f"{NAMES[control]} ({_size(gap)})")
    found = [verdict for verdict in _VERDICTS if verdict in groups]
    clauses = "; it ".join(f"{verdict} {_listed(groups[verdict])}" for verdict in found)
    sentences = [f"Differences in points, with 95% intervals in brackets: the sparse branch {clauses}."]
    if any(c in gaps for c in v.SAME_BUDGET):
        same = [NAMES[c] for c in v.SAME_BUDGET if c in gaps]
        sentences.append(f"Of these, {_listed(same)} had the same token budget.")
    if "random" not in gaps:
        sentences.append("Without the random control it is unknown whether the choice of tokens matters.")
    elif _verdict(gaps["random"], few) != _BETTER:
        sentences.append("This run therefore does not show that choosing tokens by boxes beats choosing at random.")
    kept = v.share(results, "kept_ratio")
    if kept is not None and kept >= LARGE_BUDGET:
        sentences.append(
            f"With {v.percent(kept)} of the tokens kept, even a random choice loses little; "
            "smaller budgets tell more about the choice."
        )
    return " ".join(sentences)


_BETTER = "is better than"
_VERDICTS = (
    _BETTER,
    "is worse than",
    "cannot be told apart, the interval containing 0, from",
    f"cannot be told apart, McNemar's p being {v.MAX_P} or more, from",
    f"cannot be told apart, on fewer than {v.MIN_QUESTIONS} questions, from",
    "was compared, without an interval, with",
)
_WORSE, _CONTAINS_0, _CHANCE, _FEW, _NO_INTERVAL = _VERDICTS[1:]


def _verdict(gap: v.Difference, few: bool) -> str:
    """What may be said; `few` if the whole test set has too few questions."""
    if gap.interval is None:
        return _NO_INTERVAL
    if gap.interval.contains(0):
        return _CONTAINS_0
    if few or not gap.is_enough:
        return _FEW
    if gap.is_likely_chance:
        return _CHANCE
    return _BETTER if gap.estimate > 0 else _WORSE


def _size(gap: v.Difference) -> str:
    span = f" [{v.points(gap.interval.low)}, {v.points(gap.interval.high)}]" if gap.interval else ""
    return f"{v.points(gap.estimate)}{span}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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
        f"Localizing and reasoning together took {v.seconds(total)} per question, {total / dense:.2f} times the "
        f"{v.seconds(dense)} of one dense pass of the base model in the same engine."
    )
