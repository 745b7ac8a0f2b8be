"""From stored answers to `results.json`: pure arithmetic on cases, so that scores can be made again without a model.

Keys, beside the run's own (`name`, `seed`, `dataset`, `checkpoint`, `vitos_version`, `command`):

- `num_questions`; accuracies in 0..1, an unreadable answer counting as wrong: `base_dense_accuracy` (model before
  training, all tokens), `localization_accuracy`, `sparse_accuracy`, `dense_accuracy` (trained model, all tokens)
- `relative_performance` = sparse ÷ base dense (ratio of the data sets' averages), `relative_performance_ci`
- `kept_ratio`, `kept_ratio_p10`, `kept_ratio_p90`: share of visual tokens the sparse branch saw
- `mean_iou`, `mean_iou_before`: boxes against gold, questions with gold boxes only; 0 where none could be read
- `fallback_rate` (no box, so all tokens), `parse_rate` (evidence read), `no_answer_rate` (sparse branch)
- `control_*_accuracy`: `untrained_sparse` (model before training, its own boxes), `random`, `centre`, `inverted`,
  `shifted` (same number of tokens as kept), `oracle` (gold boxes), `rl_dense` (null unless a checkpoint is given)
- `comparisons`: paired differences with 95 % bootstrap intervals and McNemar's p; `by_template`, `by_dataset`,
  `budgets`, `seconds_by_stage` (per question)

A control that is not defined for a question (inverted boxes where everything was kept) leaves it out of its mean;
`control_counts` says how many it was defined for. Comparisons use the questions that both sides have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.eval.statistics import mcnemar, paired_bootstrap_difference, paired_bootstrap_ratio

Json = Mapping[str, Any]
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
)
_BY_GROUP = ("base_dense", "localization", "sparse", "dense", "untrained_sparse", "random", "shifted", "oracle")


def summarize(cases: Sequence[Json], *, bootstrap_samples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All figures of a set of cases (rows of `cases.jsonl`).

    Raises:
        ValueError: if there is no case.
    """
    if not cases:
        raise ValueError("no question was evaluated; check data.eval and its limit")
    results: dict[str, Any] = {"num_questions": len(cases)}
    for name in ("base_dense", "localization", "sparse", "dense"):
        results[f"{name}_accuracy"] = _mean(_correct(cases, name))
    results |= _relative(cases, bootstrap_samples, seed)
    kept = _values(cases, "sparse", "kept_ratio")
    results |= {
        "kept_ratio": _mean(kept),
        "kept_ratio_p10": _quantile(kept, 0.1),
        "kept_ratio_p90": _quantile(kept, 0.9),
        "mean_iou": _mean(_values(cases, "localization", "iou")),
        "mean_iou_before": _mean(_values(cases, "untrained_localization", "iou")),
        "fallback_rate": _mean(_values(cases, "sparse", "fallback")),
        "parse_rate": _mean(_values(cases, "localization", "parsed")),
        "no_answer_rate": float(np.mean([case["conditions"]["sparse"]["answer"] is None for case in cases])),
    }
    for name in CONTROL_NAMES:
        results[f"control_{name}_accuracy"] = _mean(_correct(cases, name))
    results["control_counts"] = {name: int((~np.isnan(_correct(cases, name))).sum()) for name in CONTROL_NAMES}
    results["comparisons"] = [
        row for name in _COMPARED if (row := _compare(cases, "sparse", name, bootstrap_samples, seed)) is not None
    ]
    results["by_template"] = _by_group(cases, "template")
    results["by_dataset"] = _by_group(cases, "dataset")
    results["budgets"] = _budgets(cases)
    return results


def _relative(cases: Sequence[Json], samples: int, seed: int) -> dict[str, Any]:
    sparse, base = _correct(cases, "sparse"), _correct(cases, "base_dense")
    if np.isnan(base).any() or base.sum() == 0:
        return {"relative_performance": None, "relative_performance_ci": None}
    groups = [case.get("dataset", "") for case in cases]
    ratio = paired_bootstrap_ratio(sparse, base, groups, samples=samples, seed=seed)
    # With few questions right, some resample of the base model has none: the ratio then has no upper bound.
    interval = None if np.isnan(ratio.high) else [ratio.low, ratio.high]
    return {"relative_performance": ratio.estimate, "relative_performance_ci": interval}


def _compare(cases: Sequence[Json], a: str, b: str, samples: int, seed: int) -> dict[str, Any] | None:
    first, second = _correct(cases, a), _correct(cases, b)
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        return None
    interval = paired_bootstrap_difference(first[both], second[both], samples=samples, seed=seed)
    return {
        "a": a,
        "b": b,
        "num_questions": int(both.sum()),
        "difference": interval.estimate,
        "ci": [interval.low, interval.high],
        "p_value": mcnemar(first[both], second[both]),
    }


def _by_group(cases: Sequence[Json], key: str) -> dict[str, Any]:
    groups: dict[str, list[Json]] = {}
    for case in cases:
        groups.setdefault(case.get(key) or "", []).append(case)
    if set(groups) == {""}:
        return {}
    return {
        name: {
            "num_questions": len(rows),
            **{condition: _mean(_correct(rows, condition)) for condition in _BY_GROUP},
            "mean_iou": _mean(_values(rows, "localization", "iou")),
            "mean_iou_before": _mean(_values(rows, "untrained_localization", "iou")),
            "kept_ratio": _mean(_values(rows, "sparse", "kept_ratio")),
        }
        for name, rows in sorted(groups.items())
    }


def _budgets(cases: Sequence[Json]) -> dict[str, Any]:
    names = {name for case in cases for name in case["conditions"] if "@" in name}
    budgets: dict[str, Any] = {}
    for name in sorted(names):
        selector, budget = name.split("@")
        row = budgets.setdefault(budget, {"kept_ratio": float(budget)})
        row["sparse" if selector == "own" else selector] = _mean(_correct(cases, name))
        if selector == "own":
            row["kept_ratio"] = _mean(_values(cases, name, "kept_ratio"))
    return budgets


def _values(cases: Sequence[Json], condition: str, key: str) -> NDArray[np.float64]:
    """A field of a condition over the cases, NaN where it is missing or null."""
    found = [case["conditions"].get(condition, {}).get(key) for case in cases]
    return np.array([np.nan if value is None else float(value) for value in found])


def _correct(cases: Sequence[Json], condition: str) -> NDArray[np.float64]:
    return _values(cases, condition, "correct")


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _quantile(values: NDArray[np.float64], q: float) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, q)) if len(known) else None
