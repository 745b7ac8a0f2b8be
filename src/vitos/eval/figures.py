"""From stored answers to the figures of a bench: arithmetic on texts and gold answers, no model.

Accuracies are fractions 0..1 over the questions that a condition is defined for; an unreadable answer is wrong.
docs/bench.md explains the figures and the conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.core.geometry import Box, matched_iou
from vitos.core.record import Record
from vitos.eval.comparison import Floats, difference, mean, relative
from vitos.eval.conditions import DENSE, LOCALIZE, split_condition
from vitos.eval.scoring import Verdict, score_answer
from vitos.eval.selectors import SELECTORS
from vitos.eval.statistics import bootstrap_mean
from vitos.eval.store import EvalFolder, StoredRow

ALL = "all"
GROUPS = ("modality", "question_type", "subset", "template")
MODEL_STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One condition of one model over the n questions of some benchmarks; each array has the shape (n,).

    Attributes:
        correct: 1 for a right answer, else 0; nan without an answer.
        unread: 1 if no answer could be read, else 0; nan without an answer.
        f1: token F1; nan for questions with options.
        kept: share of the visual tokens of all images.
        fallback: 1 if a substitute for the boxes was used, else 0.
        iou: overlap of the policy's boxes with the gold ones; nan if there are none.
        left_out: 1 if the condition is not defined for the question or its budget could not be met, else 0.
        sets: name of each question's benchmark.
    """

    correct: Floats
    unread: Floats
    f1: Floats
    kept: Floats
    fallback: Floats
    iou: Floats
    left_out: Floats
    sets: NDArray[np.str_]


def figures(folder: EvalFolder, *, base: str | None = None, bootstrap_samples: int = 10_000) -> dict[str, Any]:
    """All figures of a bench.

    Args:
        base: model that accuracies are related to, in its dense condition; None: each model itself.

    Raises:
        ValueError: if the folder holds no bench, or there is no such model in it.
    """
    manifest = folder.manifest()
    models, benchmarks = list(manifest["models"]), list(manifest["benchmarks"])
    if base is not None and base not in models:
        raise ValueError(f"there is no model {base!r} in {folder.path}; it has {', '.join(models)}")
    questions = {name: folder.questions(name) for name in benchmarks}
    columns = {m: columns_of(folder, m, questions, manifest["conditions"]) for m in models}
    spans = [[name] for name in benchmarks] + ([benchmarks] if len(benchmarks) > 1 else [])
    rows, groups = [], []
    for model in models:
        for span in spans:
            made = {c: _joined([parts[b] for b in span]) for c, parts in columns[model].items()}
            dense = _joined([columns[base or model][DENSE][b] for b in span])
            where = {"model": model, "benchmark": span[0] if len(span) == 1 else ALL}
            rows += [
                where | _row(condition, made, dense, bootstrap_samples, manifest["settings"]["seed"])
                for condition, column in made.items()
                if condition != LOCALIZE and not np.isnan(column.correct).all()
            ]
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
        "left_out": [
            {"model": model, "benchmark": name, "condition": condition, "num_questions": count}
            for model in models
            for condition, parts in columns[model].items()
            for name, part in parts.items()
            if (count := int(part.left_out.sum()))
        ],
        "seconds": [_seconds(folder, model, name) for model in models for name in benchmarks],
    }


# --- columns --------------------------------------------------------------------------------------------------------


def columns_of(
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


def _column(
    name: str, records: Sequence[Record], rows: Mapping[str, StoredRow], localized: Mapping[str, StoredRow]
) -> Column:
    correct, unread, f1, kept, fallback, iou = np.full((6, len(records)), np.nan)
    left_out = np.zeros(len(records))
    for i, record in enumerate(records):
        row = rows.get(record.id)
        if row is None or row["text"] is None:
            left_out[i] = row is not None
            continue
        scored = score_answer(row["text"], record)
        correct[i] = scored.verdict is Verdict.CORRECT
        unread[i] = scored.verdict is Verdict.NO_ANSWER
        if scored.token_f1 is not None:
            f1[i] = scored.token_f1
        if "kept" in row:
            kept[i], fallback[i] = row["kept"] / row["total"], bool(row.get("fallback"))
        if record.boxes and record.id in localized:
            iou[i] = matched_iou([Box.from_json(box) for box in localized[record.id]["boxes"]], record.boxes)
    return Column(
        correct=correct,
        unread=unread,
        f1=f1,
        kept=kept,
        fallback=fallback,
        iou=iou,
        left_out=left_out,
        sets=np.full(len(records), name),
    )


def _joined(columns: Sequence[Column]) -> Column:
    names = [field.name for field in fields(Column)]
    return Column(**{name: np.concatenate([getattr(column, name) for column in columns]) for name in names})


# --- rows -----------------------------------------------------------------------------------------------------------


def _row(condition: str, columns: Mapping[str, Column], base: Column, samples: int, seed: int) -> dict[str, Any]:
    """Figures of one condition."""
    column, (name, budget) = columns[condition], split_condition(condition)
    known = ~np.isnan(column.correct)
    sets = np.unique(column.sets[known])
    accuracy = float(np.mean([column.correct[known & (column.sets == one)].mean() for one in sets]))
    interval = bootstrap_mean(column.correct[known], samples=samples, seed=seed) if len(sets) == 1 else None
    ratio, ratio_interval = relative(column.correct, base.correct, column.sets, samples, seed)
    boxed = name in SELECTORS and "boxes" in SELECTORS[name].needs

    def gap(other: str) -> dict[str, Any] | None:
        if name == split_condition(other)[0] or other not in columns:
            return None
        return difference(column.correct, columns[other].correct, samples, seed)

    return {
        "condition": condition,
        "selector": name,
        "budget": budget,
        "num_questions": int(known.sum()),
        "accuracy": accuracy,
        "accuracy_ci": [interval.low, interval.high] if interval else None,
        "no_answer_rate": float(column.unread[known].mean()),
        "token_f1": mean(column.f1),
        "kept_ratio": mean(column.kept),
        "fallback_rate": mean(column.fallback) if boxed else None,
        "iou": mean(column.iou) if boxed else None,
        "relative": ratio,
        "relative_ci": ratio_interval,
        "vs_dense": gap(DENSE),
        "vs_random": gap(f"random@{budget}"),
    }


def _groups(
    model: str, benchmark: str, records: Sequence[Record], columns: Mapping[str, Column]
) -> list[dict[str, Any]]:
    """Accuracy by modality, question type and whatever else the records say."""
    out = []
    for by in GROUPS:
        values = np.array([record.meta.get(by, "") for record in records])
        names = sorted(set(values.tolist()))
        for value in names if names != [""] else ():
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
                        "accuracy": mean(found),
                    }
                )
    return out


# --- times ----------------------------------------------------------------------------------------------------------


def _seconds(folder: EvalFolder, model: str, benchmark: str) -> dict[str, Any]:
    """Seconds per question by condition; `model_share` is the share of the wall time inside the model."""
    sums: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for row in folder.times(model, benchmark):
        part = sums.setdefault(row["condition"], {})
        counts[row["condition"]] = counts.get(row["condition"], 0) + row["questions"]
        for span, value in row["seconds"].items():
            stage = _stage(span)
            part[stage] = part.get(stage, 0.0) + value
    wall = sums.pop("wall", {}).get("wall", 0.0)
    inside = sum(part.get(stage, 0.0) for part in sums.values() for stage in MODEL_STAGES)
    return {
        "model": model,
        "benchmark": benchmark,
        "wall": wall,
        "model_share": inside / wall if wall else None,
        "per_question": {
            condition: {stage: value / counts[condition] for stage, value in part.items()}
            for condition, part in sums.items()
        },
    }


def _stage(span: str) -> str:
    """A span of the stopwatch as a column: open, vision, select, prefill or decode."""
    move = span.removeprefix("localize_").removeprefix("reason_")
    return {"prefix": "prefill", "sparsify": "select"}.get(move, move)
