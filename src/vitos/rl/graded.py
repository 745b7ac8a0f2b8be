"""Accuracies by a judge, for answers in words.

A missing answer is worth 0, and one that the rule calls exactly right is worth 1; neither is asked. If one grade of a
question cannot be had, the accuracy *abstains* for the whole group, both branches: a 0 in its place would teach that
the answer was wrong, and a mean over the others would compare unlike things.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitos.core.answers import is_right
from vitos.core.record import Record
from vitos.core.response import Response
from vitos.engines.judge.judge import Claim, Judge
from vitos.rl.extra import AnsweredQuestion, FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grades:
    """The accuracies of one question.

    Attributes:
        localization: shape (G,); all NaN if a grade is missing.
        reasoning: shape (G, K); all NaN if a grade is missing.
        asked: number of answers that a grade was wanted for.
        missing: number of those that have none.
    """

    localization: FloatArray
    reasoning: FloatArray
    asked: int
    missing: int


def grade_questions(questions: Sequence[AnsweredQuestion], judge: Judge) -> list[Grades | None]:
    """The grades of each question, all asked for at once; None where the rule decides because of the kind.

    Raises:
        JudgeError: if the judge cannot be used at all.
    """
    known: list[list[float | Claim] | None] = []
    for question in questions:
        responses = [*question.localizations, *question.flat_reasonings]
        own = question.record.kind in judge.section.kinds
        known.append([_known(response, question.record) for response in responses] if own else None)
    claims = [one for row in known if row is not None for one in row if isinstance(one, Claim)]
    grades = iter(judge.grade(claims) if claims else ())
    return [None if row is None else _grades(q, row, grades) for q, row in zip(questions, known, strict=True)]


def _known(response: Response, record: Record) -> float | Claim:
    """What an answer is worth without asking, or the claim to ask about."""
    if response.answer is None:
        return 0.0
    return 1.0 if is_right(response.answer, record) else Claim.about(record, response.answer)


def _grades(question: AnsweredQuestion, known: Sequence[float | Claim], grades: Iterator[float | None]) -> Grades:
    values = [next(grades) if isinstance(one, Claim) else one for one in known]
    found = np.array(values, dtype=np.float64)  # None becomes NaN
    missing = int(np.isnan(found).sum())
    if missing:
        found[:] = np.nan
    g, k = question.shape
    asked = sum(isinstance(one, Claim) for one in known)
    return Grades(localization=found[:g], reasoning=found[g:].reshape(g, k), asked=asked, missing=missing)
