"""The gold answer of a record: `answer`, `kind`, `accepted` and `tolerance`, validated together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from vitos.core.answers import FORMS, answer_problem
from vitos.core.record import AnswerKind, parse_options
from vitos.data.fields import Report, is_broken, show


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldAnswer:
    """The fields of a `Record` that say what is right."""

    answer: str
    kind: AnswerKind
    accepted: tuple[str, ...]
    tolerance: str


def parse_gold(raw: Mapping[str, Any], question: str, report: Report) -> GoldAnswer:
    """Read the fields of one item of the record format and report every problem in them."""
    kind = _parse_kind(raw.get("kind", "letter"), report)
    tolerance = _parse_tolerance(raw.get("tolerance", ""), report)
    answer = _parse_answer(raw["answer"], kind, tolerance, question, report) if "answer" in raw else ""
    accepted = _parse_accepted(raw.get("accepted", []), kind, tolerance, report)
    return GoldAnswer(answer=answer, kind=kind, accepted=accepted, tolerance=tolerance)


def _parse_kind(raw: object, report: Report) -> AnswerKind:
    if isinstance(raw, str) and raw in FORMS:
        return cast(AnswerKind, raw)
    report("kind", f"is {show(raw)}", f"write one of {', '.join(FORMS)}, or leave it out for a letter")
    return "letter"


def _parse_tolerance(raw: object, report: Report) -> str:
    if isinstance(raw, str) or (isinstance(raw, int | float) and not isinstance(raw, bool)):
        return str(raw)
    report("tolerance", f"is {show(raw)}, not a text or a number", 'write "2 mm" or "10 %"')
    return ""


def _parse_answer(raw: object, kind: AnswerKind, tolerance: str, question: str, report: Report) -> str:
    """The gold answer; a letter must be among the options if the question's options can be read."""
    answer = _written(raw, kind)
    problem = answer_problem(kind, answer, tolerance) if answer is not None else f"is {show(raw)}, not a text"
    if kind == "letter" and not re.fullmatch("[A-Z]", answer or ""):
        remedy = "write the letter of the right option, or say the answer's kind (docs/data.md)"
        report("answer", f"is {show(raw)}, not a letter A to Z", remedy)
    elif is_broken("answer", answer or "", report):
        return ""
    elif problem:
        report("answer", problem, f"write it as docs/data.md says for kind {kind}")
    elif kind == "letter" and (options := parse_options(question)) and answer not in options:
        report("answer", f"{answer} is none of the options {', '.join(options)}", "correct the letter or the options")
    return answer or ""


def _parse_accepted(raw: object, kind: AnswerKind, tolerance: str, report: Report) -> tuple[str, ...]:
    """The further answers, each valid for the kind."""
    if not isinstance(raw, list):
        report("accepted", f"is {show(raw)}, not a list of answers", "write a list")
        return ()
    if raw and kind == "letter":
        report("accepted", "is for answers in words", "leave it out: one option is right")
    accepted = []
    for index, one in enumerate(raw):
        answer, field = _written(one, kind), f"accepted[{index}]"
        problem = answer_problem(kind, answer, tolerance) if answer is not None else f"is {show(one)}, not a text"
        if problem:
            report(field, problem, f"write it as docs/data.md says for kind {kind}")
        elif not is_broken(field, answer or "", report):
            accepted.append(answer or "")
    return tuple(accepted)


def _written(raw: object, kind: AnswerKind) -> str | None:
    """An answer as text: numbers as they are, the findings of a list joined by semicolons; None for anything else."""
    if kind == "number" and isinstance(raw, int | float) and not isinstance(raw, bool):
        return str(raw)
    if kind == "list" and isinstance(raw, list) and raw and all(isinstance(x, str) and ";" not in x for x in raw):
        return "; ".join(raw)
    return raw if isinstance(raw, str) else None
