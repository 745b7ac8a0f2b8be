"""Stored answers as cases: one row per question with all its conditions, as in `cases.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vitos.core.geometry import Box, matched_iou
from vitos.core.record import Record
from vitos.eval.answer import unpacked
from vitos.eval.conditions import BLANK, CONTROL, DENSE, LOCALIZE, OWN_BOXES
from vitos.eval.judged import AnswerKey, read_grades
from vitos.eval.scoring import Verdict, score_answer
from vitos.eval.store import EvalFolder, StoredRow

TRAINED, BASE, RL_DENSE, HEAD = "trained", "base", "rl_dense", "evidence_head"
NAMES = {
    TRAINED: {LOCALIZE: "localization", OWN_BOXES: "sparse", DENSE: "dense", BLANK: "text_only"},
    BASE: {
        DENSE: "base_dense",
        LOCALIZE: "untrained_localization",
        OWN_BOXES: "untrained_sparse",
        BLANK: "untrained_text_only",
    },
    RL_DENSE: {DENSE: "rl_dense"},
    HEAD: {OWN_BOXES: "evidence_head"},
}
"""Model → stored condition → its name in a case."""


def cases_of(folder: EvalFolder, models: Sequence[str]) -> list[StoredRow]:
    """All answered questions in the order of their data sets, without records that were left out."""
    cases: list[StoredRow] = []
    grades = read_grades(folder.path)
    for name in folder.manifest()["benchmarks"]:
        stored = {model: folder.answers(model, name) for model in models}
        images = folder.images(models[0], name)
        records = [record for record in folder.questions(name) if record.id in images]
        cases += [_case(name, record, images[record.id], stored, grades) for record in records]
    return cases


def _case(
    dataset: str,
    record: Record,
    image: StoredRow,
    stored: Mapping[str, Mapping[str, Mapping[str, StoredRow]]],
    grades: Mapping[AnswerKey, float | None],
) -> StoredRow:
    conditions: dict[str, StoredRow] = {}
    for model, by_condition in stored.items():
        for condition, rows in by_condition.items():
            name = NAMES[model].get(condition, condition.removeprefix(CONTROL))
            row = rows.get(record.id)
            if row is not None and row["text"] is not None:
                conditions[name] = _condition(record, condition, row)
                if (key := (model, dataset, condition, record.id)) in grades:
                    conditions[name]["judge"] = grades[key]
    return {
        "dataset": dataset,
        "id": record.id,
        "template": record.meta.get("template", ""),
        "image": image["image"],
        "images": image["images"],
        "question": record.question,
        "gold": record.answer,
        **({} if record.kind == "letter" else {"kind": record.kind, "accepted": list(record.accepted)}),
        "gold_boxes": [box.to_json() for box in record.boxes or ()],
        "grid": image["grid"],
        "shown": image["shown"],
        "conditions": conditions,
    } | ({"others": image["others"]} if "others" in image else {})


def _condition(record: Record, condition: str, row: StoredRow) -> StoredRow:
    scored = score_answer(row["text"], record)
    out: StoredRow = {"text": row["text"], "answer": scored.answer, "correct": scored.verdict is Verdict.CORRECT}
    if scored.token_f1 is not None:
        out |= {"token_f1": scored.token_f1, "score": scored.score}
    if condition == LOCALIZE:
        boxes = [Box.from_json(box) for box in row["boxes"]]
        iou = matched_iou(boxes, record.boxes) if record.boxes else None
        return out | {"boxes": row["boxes"], "parsed": row["parsed"], "iou": iou}
    if condition != DENSE:
        mask = unpacked(row)
        kept = {"kept": np.flatnonzero(mask).tolist(), "kept_ratio": float(mask.mean())}
        return out | kept | {"fallback": bool(row.get("fallback"))}
    return out
