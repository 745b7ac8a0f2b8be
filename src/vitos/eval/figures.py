"""From stored answers to figures: arithmetic on text and gold answers alone, no model (`vitos bench rescore`).

A *condition* is a selector at a budget, such as `divprune@0.25`; `dense` sees all tokens, `policy@own` as many as the
policy's own boxes keep. Accuracies are fractions 0..1 over the questions a condition is defined for; an unreadable
answer is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.core.geometry import Box, matched_iou
from vitos.core.record import Record
from vitos.eval.conditions import DENSE, LOCALIZE, split_condition
from vitos.eval.scoring import Verdict, score_answer
from vitos.eval.statistics import bootstrap_mean, mcnemar, paired_bootstrap_difference, paired_bootstrap_ratio
from vitos.eval.store import EvalFolder, Row

ALL = "all"
GROUPS = ("modality", "question_type", "subset", "template")
MODEL_STAGES = ("vision", "prefill", "decode")
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Column:
    """One condition of one model over the questions of some benchmarks, nan where it is not defined.

    Attributes:
        correct, unread, f1: of every question, shape (n,).
        kept, fallback: share of the first image's tokens; 1 where a substitute for the boxes was used.
        sets: name of every question's benchmark.
    """

    correct: Floats
    unread: Floats
    f1: Floats
    kept: Floats
    fallback: Floats
    iou: Floats
    sets: NDArray[np.str_]


def figures(folder: EvalFolder, *, base: str | None = None, bootstrap_samples: int = 10_000) -> dict[str, Any]:
    """All figures of a bench.

    Args:
        base: the model whose dense accuracy others are related to; by default each model's own.

    Raises:
        ValueError: if the folder is no bench, or there is no such model in it.
    """
    manifest = folder.manifest()
    models, benchmarks = list(manifest["models"]), list(manifest["benchmarks"])
    if base is not None and base not in models:
        raise ValueError(f"there is no model {base!r} in {folder.path}; it has {', '.join(models)}")
    questions = {name: folder.questions(name) for name in benchmarks}
    columns = {m: _columns(folder, m, questions, manifest["conditions"]) for m in models}
    spans = [[name] for name in benchmarks] + ([benchmarks] if len(benchmarks) > 1 else [])
    rows, groups = [], []
    for model in models:
        for span in spans:
            made = {c: _joined([parts[b] for b in span]) for c, parts in columns[model].items()}
            dense = _joined([columns[base or model][DENSE][b] for b in span])
            for condition, column in made.items():
                if condition != LOCALIZE and not np.isnan(column.correct).all():
                    rows.append(
                        {
                            "model": model,
                            "benchmark": span[0] if len(span) == 1 else ALL,
                            **_row(condition, made, dense, bootstrap_samples, manifest["settings"]["seed"]),
                        }
                    )
        for name in benchmarks:
            groups += _groups(model, name, questions[name], {c: parts[name] for c, parts in columns[model].items()})
    return {
        "vitos_version": manifest["vitos_version"],
        "settings": manifest["settings"],
        "base": base,
        "models": manifest["models"],
        "benchmarks": manifest["benchmarks"],
        "rows": rows,
        "groups": groups,
        "seconds": _seconds(folder, models, benchmarks),
    }


# --- columns --------------------------------------------------------------------------------------------------------


def _columns(
    folder: EvalFolder, model: str, questions: Mapping[str, Sequence[Record]], conditions: Sequence[str]
) -> dict[str, dict[str, Column]]:
    """By condition and benchmark."""
    out: dict[str, dict[str, Column]] = {condition: {} for condition in conditions}
    for name, records in questions.items():
        stored = folder.answers(model, name)
        for condition in conditions:
            rows = stored.get(condition, {})
            out[condition][name] = _column(name, records, rows, stored.get(LOCALIZE, {}))
    return out


def _column(name: str, records: Sequence[Record], rows: Mapping[str, Row], localized: Mapping[str, Row]) -> Column:
    values = np.full((6, len(records)), np.nan)
    for i, record in enumerate(records):
        row = rows.get(record.id)
        if row is None or row["text"] is None:
            continue
        scored = score_answer(row["text"], record)
        values[0, i] = scored.verdict is Verdict.CORRECT
        values[1, i] = scored.verdict is Verdict.NO_ANSWER
        if scored.token_f1 is not None:
            values[2, i] = scored.token_f1
        if "kept" in row:
            values[3, i], values[4, i] = row["kept"] / row["total"], bool(row.get("fallback"))
        if record.boxes and record.id in localized:
            values[5, i] = matched_iou([Box(*box) for box in localized[record.id]["boxes"]], record.boxes)
    correct, unread, f1, kept, fallback, iou = values
    return Column(correct, unread, f1, kept, fallback, iou, np.full(len(records), name))


def _joined(columns: Sequence[Column]) -> Column:
    fields = ("correct", "unread", "f1", "kept", "fallback", "iou", "sets")
    return Column(*(np.concatenate([getattr(column, name) for column in columns]) for name in fields))


# --- rows -----------------------------------------------------------------------------------------------------------


def _row(condition: str, columns: Mapping[str, Column], base: Column, samples: int, seed: int) -> dict[str, Any]:
    """Figures of one condition."""
    column, (selector, budget) = columns[condition], split_condition(condition)
    known = ~np.isnan(column.correct)
    names = np.unique(column.sets[known])
    accuracy = float(np.mean([column.correct[known & (column.sets == name)].mean() for name in names]))
    interval = bootstrap_mean(column.correct[known], samples=samples, seed=seed) if len(names) == 1 else None
    goes_by_boxes = selector in ("policy", "inverted", "crop")
    return {
        "condition": condition,
        "selector": selector,
        "budget": budget,
        "num_questions": int(known.sum()),
        "accuracy": accuracy,
        "accuracy_ci": [interval.low, interval.high] if interval else None,
        "no_answer_rate": float(column.unread[known].mean()),
        "token_f1": _mean(column.f1),
        "kept_ratio": _mean(column.kept),
        "fallback_rate": _mean(column.fallback) if goes_by_boxes else None,
        "iou": _mean(column.iou) if goes_by_boxes else None,
        **_relative(column, base, samples, seed),
        "vs_dense": _difference(column, columns[DENSE], samples, seed) if condition != DENSE else None,
        "vs_random": (
            _difference(column, columns[f"random@{budget}"], samples, seed)
            if selector != "random" and f"random@{budget}" in columns
            else None
        ),
    }


def _relative(column: Column, base: Column, samples: int, seed: int) -> dict[str, Any]:
    """Accuracy ÷ the base model's dense accuracy on the same questions; over several benchmarks ratio of averages."""
    both = ~(np.isnan(column.correct) | np.isnan(base.correct))
    if not both.any() or base.correct[both].sum() == 0:
        return {"relative": None, "relative_ci": None}
    ratio = paired_bootstrap_ratio(
        column.correct[both], base.correct[both], column.sets[both], samples=samples, seed=seed
    )
    return {"relative": ratio.estimate, "relative_ci": None if np.isnan(ratio.high) else [ratio.low, ratio.high]}


def _difference(a: Column, b: Column, samples: int, seed: int) -> dict[str, Any] | None:
    """a − b over all questions that both have, each question alike."""
    both = ~(np.isnan(a.correct) | np.isnan(b.correct))
    if not both.any():
        return None
    first, second = a.correct[both], b.correct[both]
    interval = paired_bootstrap_difference(first, second, samples=samples, seed=seed)
    return {
        "num_questions": int(both.sum()),
        "difference": interval.estimate,
        "ci": [interval.low, interval.high],
        "p_value": mcnemar(first, second),
    }


def _groups(
    model: str, benchmark: str, records: Sequence[Record], columns: Mapping[str, Column]
) -> list[dict[str, Any]]:
    """Accuracy by modality, question type and what else the records say."""
    out = []
    for by in GROUPS:
        values = np.array([record.meta.get(by, "") for record in records])
        if set(values.tolist()) == {""}:
            continue
        for value in sorted(set(values.tolist())):
            for condition, column in columns.items():
                found = column.correct[values == value]
                if condition == LOCALIZE or np.isnan(found).all():
                    continue
                out.append(
                    {
                        "model": model,
                        "benchmark": benchmark,
                        "by": by,
                        "value": value,
                        "condition": condition,
                        "num_questions": int((~np.isnan(found)).sum()),
                        "accuracy": _mean(found),
                    }
                )
    return out


# --- times ----------------------------------------------------------------------------------------------------------


def _seconds(folder: EvalFolder, models: Sequence[str], benchmarks: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds per question by model, benchmark and condition; `model_share` of the wall time inside the model."""
    out = []
    for model in models:
        for name in benchmarks:
            sums: dict[str, dict[str, float]] = {}
            counts: dict[str, int] = {}
            for row in folder.times(model, name):
                part = sums.setdefault(row["condition"], {})
                counts[row["condition"]] = counts.get(row["condition"], 0) + row["questions"]
                for span, value in row["seconds"].items():
                    stage = _stage(span)
                    part[stage] = part.get(stage, 0.0) + value
            wall = sums.pop("wall", {}).get("wall", 0.0)
            inside = sum(part.get(stage, 0.0) for part in sums.values() for stage in MODEL_STAGES)
            out.append(
                {
                    "model": model,
                    "benchmark": name,
                    "wall": wall,
                    "model_share": inside / wall if wall else None,
                    "per_question": {
                        condition: {stage: value / counts[condition] for stage, value in part.items()}
                        for condition, part in sums.items()
                    },
                }
            )
    return out


def _stage(span: str) -> str:
    """A span of the stopwatch as a column: open, vision, select, prefill or decode."""
    move = span.removeprefix("localize_").removeprefix("reason_")
    return {"prefix": "prefill", "sparsify": "select"}.get(move, move)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
