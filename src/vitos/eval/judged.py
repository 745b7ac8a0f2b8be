"""What a judge makes of stored answers, next to the rule: grades in `judge.jsonl`, and how far the two agree.

All answers in words are graded, those that the rule calls right as well: an agreement over the others alone would say
nothing of the rule. A missing answer is worth 0 and is not asked; a grade that cannot be had is left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitos.core.response import read_answer_text
from vitos.data.files import write_text_atomic
from vitos.engines.judge.judge import Claim, Judge
from vitos.eval.comparison import Floats
from vitos.eval.store import EvalFolder, read_rows

GRADES = "judge.jsonl"
RIGHT = 0.5
"""A grade above this is counted as right where the judge is compared with the rule; "partly" is not."""

AnswerKey = tuple[str, str, str, str]
"""(model, data set, condition, question id)"""


def grade_answers(folder: Path, models: Sequence[str], judge: Judge) -> dict[str, Any]:
    """Grade all stored answers in words and write the grades to `judge.jsonl`; returns what a report says of it.

    Raises:
        JudgeError: if the judge cannot be used at all.
    """
    stored, claims = EvalFolder(folder), dict[AnswerKey, Claim | None]()
    for name in stored.manifest()["benchmarks"]:
        asked = {record.id: record for record in stored.questions(name) if record.kind != "letter"}
        for model in models:
            for condition, rows in stored.answers(model, name).items():
                for key, record in asked.items():
                    if key in rows and rows[key]["text"] is not None:
                        answer = read_answer_text(rows[key]["text"])
                        claims[model, name, condition, key] = None if answer is None else Claim.about(record, answer)
    grades = iter(judge.grade([claim for claim in claims.values() if claim is not None]))
    lines = (
        json.dumps([*key, 0.0 if claim is None else next(grades)], ensure_ascii=False) for key, claim in claims.items()
    )
    write_text_atomic(folder / GRADES, "".join(f"{line}\n" for line in lines))
    return judge.describe()


def read_grades(folder: Path) -> dict[AnswerKey, float | None]:
    """The grades of `judge.jsonl`; empty where no judge was asked. None: a grade that could not be had."""
    file = folder / GRADES
    rows: Sequence[Any] = read_rows(file) if file.is_file() else ()
    return {(row[0], row[1], row[2], row[3]): row[4] for row in rows}


def agreement(rule: Floats, judge: Floats) -> dict[str, float | int | None]:
    """How far two graders agree on the same answers, each calling them right or wrong.

    Args:
        rule, judge: scores 0..1 of n answers; nan where one has none. Scores above `RIGHT` are right.

    Returns:
        `answers`, the number that both graded; `agreement`, the share with one verdict; and `kappa`, Cohen's
        (Educational and Psychological Measurement 20, 1960): None where both give all answers one verdict.
    """
    both = ~(np.isnan(rule) | np.isnan(judge))
    a, b = rule[both] > RIGHT, judge[both] > RIGHT
    if not len(a):
        return {"answers": 0, "agreement": None, "kappa": None}
    observed = float((a == b).mean())
    by_chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    kappa = (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None
    return {"answers": len(a), "agreement": observed, "kappa": kappa}


def graded(cases: Sequence[Mapping[str, Any]], condition: str, key: str) -> Floats:
    """A figure of a condition over the cases, nan where there is none."""
    found = [case["conditions"].get(condition, {}).get(key) for case in cases]
    return np.array([np.nan if value is None else float(value) for value in found])
