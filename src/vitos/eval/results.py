"""From stored answers to `results.json`: arithmetic on cases, so that scores can be made again without a model.

docs/results.md explains each key. Accuracies are in 0..1, and an unreadable answer counts as wrong. A control that is
not defined for a question (inverted boxes where everything was kept) leaves the question out of its mean;
`control_counts` has the number of questions that it was defined for. Comparisons use the questions that both sides
have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitos.eval.comparison import Floats, difference, mean, relative
from vitos.eval.open_answers import open_figures
from vitos.eval.statistics import bootstrap_mean

Case = Mapping[str, Any]
"""One row of `cases.jsonl`."""

CONTROL_NAMES = ("untrained_sparse", "random", "centre", "inverted", "shifted", "oracle", "rl_dense")
_COMPARED = (
    "base_dense",
    "dense",
    "untrained_sparse",
    "random",
    "shifted",
    "centre",
    "inverted",
    "oracle",
    "rl_dense",
    "text_only",
    "evidence_head",
)
_BY_GROUP = ("base_dense", "localization", "sparse", "dense", "untrained_sparse", "random", "shifted", "oracle")


def summarize(
    cases: Sequence[Case], *, bootstrap_samples: int = 10_000, seed: int = 0, metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """All figures of a set of cases (rows of `cases.jsonl`).

    Args:
        metrics: names of measures of text (`vitos.eval.metrics`) for answers in words.

    Raises:
        ValueError: if there is no case.
    """
    if not cases:
        raise ValueError("no question was evaluated; check data.eval and its limit")
    results: dict[str, Any] = {"num_questions": len(cases)}
    for name in ("base_dense", "localization", "sparse", "dense"):
        results[f"{name}_accuracy"] = mean(_correct(cases, name))
    results |= _relative(cases, bootstrap_samples, seed)
    kept = _values(cases, "sparse", "kept_ratio")
    results |= {
        "kept_ratio": mean(kept),
        "kept_ratio_p10": _quantile(kept, 0.1),
        "kept_ratio_p90": _quantile(kept, 0.9),
        "mean_iou": mean(_values(cases, "localization", "iou")),
        "mean_iou_before": mean(_values(cases, "untrained_localization", "iou")),
        "fallback_rate": mean(_values(cases, "sparse", "fallback")),
        "parse_rate": mean(_values(cases, "localization", "parsed")),
        "no_answer_rate": float(np.mean([case["conditions"]["sparse"]["answer"] is None for case in cases])),
    }
    controls = {name: _correct(cases, name) for name in CONTROL_NAMES}
    results |= {f"control_{name}_accuracy": mean(correct) for name, correct in controls.items()}
    results["control_counts"] = {name: int((~np.isnan(correct)).sum()) for name, correct in controls.items()}
    sparse = _correct(cases, "sparse")
    gaps = {name: difference(sparse, _correct(cases, name), bootstrap_samples, seed) for name in _COMPARED}
    results["conditions"] = _conditions(cases, bootstrap_samples, seed)
    results["comparisons"] = [{"a": "sparse", "b": name} | gap for name, gap in gaps.items() if gap]
    results["by_template"] = _by_group(cases, "template")
    results["by_dataset"] = _by_group(cases, "dataset")
    results["budgets"] = _budgets(cases)
    if "evidence_head" in results["conditions"]:
        gap = difference(_correct(cases, "evidence_head"), _correct(cases, "base_dense"), bootstrap_samples, seed)
        results["evidence_head"] = results["conditions"]["evidence_head"] | {"minus_base_dense": gap}
    if any("text_only" in case["conditions"] for case in cases):
        results["control_text_only_accuracy"] = mean(_correct(cases, "text_only"))
    if found := open_figures(cases, samples=bootstrap_samples, seed=seed, metrics=metrics):
        results["open"] = found
    return results


def _conditions(cases: Sequence[Case], samples: int, seed: int) -> dict[str, Any]:
    """Accuracy with its interval, and mean share of tokens kept (1 for all tokens), of every condition but budgets."""
    names = dict.fromkeys(name for case in cases for name in case["conditions"] if "@" not in name)
    rows: dict[str, Any] = {}
    for name in names:
        correct = _correct(cases, name)
        known = correct[~np.isnan(correct)]
        if len(known):
            interval = bootstrap_mean(known, samples=samples, seed=seed)
            kept = mean(_values(cases, name, "kept_ratio"))
            rows[name] = {
                "num_questions": len(known),
                "accuracy": interval.estimate,
                "ci": [interval.low, interval.high],
                "kept_ratio": 1.0 if kept is None else kept,
            }
    return rows


def _relative(cases: Sequence[Case], samples: int, seed: int) -> dict[str, Any]:
    """Sparse ÷ base dense; null where the base was not asked every question."""
    base = _correct(cases, "base_dense")
    ratio, interval = None, None
    if not np.isnan(base).any():
        sets = [case.get("dataset", "") for case in cases]
        ratio, interval = relative(_correct(cases, "sparse"), base, sets, samples, seed)
    return {"relative_performance": ratio, "relative_performance_ci": interval}


def _by_group(cases: Sequence[Case], key: str) -> dict[str, Any]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.get(key) or "", []).append(case)
    if set(groups) == {""}:
        return {}
    return {
        name: {
            "num_questions": len(rows),
            **{condition: mean(_correct(rows, condition)) for condition in _BY_GROUP},
            "mean_iou": mean(_values(rows, "localization", "iou")),
            "mean_iou_before": mean(_values(rows, "untrained_localization", "iou")),
            "kept_ratio": mean(_values(rows, "sparse", "kept_ratio")),
        }
        for name, rows in sorted(groups.items())
    }


def _budgets(cases: Sequence[Case]) -> dict[str, Any]:
    names = {name for case in cases for name in case["conditions"] if "@" in name}
    budgets: dict[str, Any] = {}
    for name in sorted(names):
        selector, budget = name.split("@")
        row = budgets.setdefault(budget, {"kept_ratio": float(budget)})
        row["sparse" if selector == "own" else selector] = mean(_correct(cases, name))
        if selector == "own":
            row["kept_ratio"] = mean(_values(cases, name, "kept_ratio"))
    return budgets


def _values(cases: Sequence[Case], condition: str, key: str) -> Floats:
    """A field of a condition over the cases, nan where it is missing or null."""
    found = [case["conditions"].get(condition, {}).get(key) for case in cases]
    return np.array([np.nan if value is None else float(value) for value in found])


def _correct(cases: Sequence[Case], condition: str) -> Floats:
    return _values(cases, condition, "correct")


def _quantile(values: Floats, q: float) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, q)) if len(known) else None
