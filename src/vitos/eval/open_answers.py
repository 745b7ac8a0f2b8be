"""Figures of answers in words: the rule's score, the judge's next to it, and measures of report text.

The score is the one that training rewards (`vitos.core.answers`), 0..1; "exactly right" is the accuracy of the other
tables. All figures are over the questions that are not answered by a letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitos.eval.comparison import Floats, mean
from vitos.eval.judged import agreement, graded
from vitos.eval.metrics import measure
from vitos.eval.statistics import bootstrap_mean, paired_bootstrap_difference

Case = Mapping[str, Any]
COMPARED = ("base_dense", "untrained_sparse", "dense", "text_only", "random", "oracle", "rl_dense")


def open_figures(
    cases: Sequence[Case], *, samples: int = 10_000, seed: int = 0, metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """All figures of the questions with answers in words, by condition; empty if there are none.

    Args:
        cases: rows of `cases.jsonl`, letters included.
        samples: number of resamples per interval.
        metrics: names of measures of text (`vitos.eval.metrics`).

    Raises:
        MetricError: as `measure`.
    """
    own = [case for case in cases if "kind" in case]
    if not own:
        return {}
    names = list(dict.fromkeys(name for case in own for name in case["conditions"]))
    scores = {name: graded(own, name, "score") for name in names}
    grades = {name: graded(own, name, "judge") for name in names}
    return {
        "num_questions": len(own),
        "kinds": dict(Counter(case["kind"] for case in own)),
        "conditions": {
            name: {
                "num_questions": int((~np.isnan(scores[name])).sum()),
                **_with_interval("score", scores[name], samples, seed),
                "exact": mean(graded(own, name, "correct")),
                **_with_interval("judge", grades[name], samples, seed),
                **agreement(graded(own, name, "correct"), grades[name]),
                **_measured(own, name, metrics),
            }
            for name in names
        },
        "comparisons": [
            {"a": "sparse", "b": other, "by": by} | gap
            for by, values in (("score", scores), ("judge", grades))
            for other in COMPARED
            if other in values and (gap := _difference(values["sparse"], values[other], samples, seed))
        ],
        "by_kind": {
            kind: {name: mean(scores[name][[case["kind"] == kind for case in own]]) for name in names}
            for kind in dict.fromkeys(case["kind"] for case in own)
        },
    }


def _with_interval(name: str, values: Floats, samples: int, seed: int) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {name: None, f"{name}_ci": None}
    found = bootstrap_mean(known, samples=samples, seed=seed)
    return {name: found.estimate, f"{name}_ci": [found.low, found.high]}


def _difference(a: Floats, b: Floats, samples: int, seed: int) -> dict[str, Any] | None:
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return None
    found = paired_bootstrap_difference(a[both], b[both], samples=samples, seed=seed)
    return {"num_questions": int(both.sum()), "difference": found.estimate, "ci": [found.low, found.high]}


def _measured(cases: Sequence[Case], condition: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Measures of text over the questions that the condition answers."""
    asked = [case for case in cases if condition in case["conditions"]]
    if not metrics or not asked:
        return {}
    answers = [case["conditions"][condition]["answer"] or "" for case in asked]
    references = [[case["gold"], *case.get("accepted", ())] for case in asked]
    return {"metrics": {f"{name}.{k}": x for name in metrics for k, x in measure(name, answers, references).items()}}
