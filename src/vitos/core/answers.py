"""The kinds of answers: what is asked for, and how an answer is scored against the gold one, 0..1.

| kind | asked for | score |
| --- | --- | --- |
| `letter` | the letter of an option | 1 for the letter, else 0 |
| `word` | one word of a closed question | 1 for the same after `normalize_answer`, else 0 |
| `number` | a number with its unit | 1 within the record's tolerance, units converted, else 0 |
| `list` | all findings | F1 of the two sets, each finding the same after `normalize_answer` |
| `text` | a few words | 1 for the same after `normalize_answer`, else the token F1 |

A record may accept several answers; the best score counts. Training (`vitos.rl.rewards`) and evaluation
(`vitos.eval.scoring`) both score by `score_answer_text`. A new kind is a row of `FORMS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vitos.core.quantity import is_within, quantity_problem
from vitos.core.record import AnswerKind, Record
from vitos.core.wording import normalize_answer

# Chinese and Japanese are written without spaces: there, a character is a token.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_BETWEEN = re.compile(r"\s*(?:[;\n；、]|(?<!\d),|,(?!\d))\s*")
_AND = re.compile(r"\s+(?:and|und|plus)\s+|\s*&\s*|\s+(?:with|as well as)\s+", re.IGNORECASE)
_BULLET = re.compile(r"^(?:[-•*–]|\(?\d{1,2}[.)])\s+|^(?:and|plus)\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How answers of one kind are asked for and scored.

    Attributes:
        request: what a prompt asks for.
        closed: whether there are few possible answers; open questions are left out of the protocol `choice`.
        score: (answer, gold answer, tolerance) → 0..1.
        same: (answer, gold answer, tolerance) → whether the answer is exactly right.
        problem: (gold answer, tolerance) → what is wrong with a gold answer; empty if nothing is.
    """

    request: str
    closed: bool = False
    score: Callable[[str, str, str], float]
    same: Callable[[str, str, str], bool]
    problem: Callable[[str, str], str]


def score_answer_text(answer: str | None, record: Record) -> float:
    """What an answer is worth, 0..1: its best score against the accepted answers; 0 without an answer.

    >>> record = Record("r", (), "<image>How large is it?", "12 mm", kind="number", tolerance="1 mm")
    >>> score_answer_text("1.2 cm", record), score_answer_text("2 cm", record), score_answer_text("12", record)
    (1.0, 0.0, 0.0)

    Args:
        answer: the letter or, for other kinds, the text as it was written.
    """
    form = FORMS[record.kind]
    return 0.0 if answer is None else max(form.score(answer, gold, record.tolerance) for gold in record.golds)


def is_right(answer: str | None, record: Record) -> bool:
    """Whether an answer is exactly one of the accepted ones; a number within its tolerance is."""
    form = FORMS[record.kind]
    return answer is not None and any(form.same(answer, gold, record.tolerance) for gold in record.golds)


def answer_problem(kind: AnswerKind, gold: str, tolerance: str = "") -> str:
    """What is wrong with a gold answer of a kind, as the end of a sentence; empty if nothing is."""
    return FORMS[kind].problem(gold, tolerance) if gold.strip() else "is blank"


# --- texts ----------------------------------------------------------------------------------------------------------


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the tokens of both normalised texts, counted with repeats; 0..1.

    Tokens are words, numbers and signs, and characters of Chinese and Japanese (SQuAD's script, but for the signs and
    the characters).
    """
    given, wanted = (Counter(_TOKEN.findall(normalize_answer(part))) for part in (answer, gold))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def _same_text(answer: str, gold: str, tolerance: str) -> bool:
    return normalize_answer(answer) == normalize_answer(gold)


def _text_score(answer: str, gold: str, tolerance: str) -> float:
    return 1.0 if _same_text(answer, gold, tolerance) else token_f1(answer, gold)


# --- lists ----------------------------------------------------------------------------------------------------------


def list_findings(text: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """The findings in a list, each normalised: split at semicolons, commas, line breaks, and "and".

    >>> sorted(list_findings("1. Cardiomegaly, pleural effusion and a nodule"))
    ['cardiomegaly', 'nodule', 'pleural effusion']

    Args:
        known: normalised findings that hold an "and" or a comma themselves, such as "nausea and vomiting".
    """
    found: set[str] = set()
    for line in re.split(r"[;\n；]", text):
        parts = [line] if _plain(line) in known else _BETWEEN.split(line)
        for part in parts:
            found.update(map(_plain, [part] if _plain(part) in known else _AND.split(part)))
    return frozenset(found - {""})


def _plain(part: str) -> str:
    return normalize_answer(_BULLET.sub("", part.strip()))


def _gold_findings(gold: str) -> frozenset[str]:
    """The findings of a gold list: where it has semicolons or lines, these alone separate them."""
    if re.search(r"[;\n；]", gold):
        return frozenset(map(_plain, re.split(r"[;\n；]", gold))) - {""}
    return list_findings(gold)


def list_f1(answer: str, gold: str) -> float:
    """F1 of the sets of findings in two lists, 0..1; a finding that is named twice counts once.

    >>> list_f1("cardiomegaly and pneumothorax", "cardiomegaly; pleural effusion")
    0.5
    """
    wanted = _gold_findings(gold)
    given = list_findings(answer, wanted)
    shared = len(given & wanted)
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


# --- all kinds ------------------------------------------------------------------------------------------------------


def _no_problem(gold: str, tolerance: str) -> str:
    return f"has the tolerance {tolerance[:40]!r}; only numbers have one" if tolerance else ""


def _letter_problem(gold: str, tolerance: str) -> str:
    return _no_problem(gold, tolerance) if re.fullmatch("[A-Z]", gold) else f"is {gold[:40]!r}, not a letter A to Z"


def _list_problem(gold: str, tolerance: str) -> str:
    return _no_problem(gold, tolerance) or ("" if _gold_findings(gold) else f"names no finding: {gold[:40]!r}")


FORMS: Mapping[AnswerKind, AnswerForm] = {
    "letter": AnswerForm(
        request="the letter of the right option",
        closed=True,
        score=lambda answer, gold, _: float(answer == gold),
        same=lambda answer, gold, _: answer == gold,
        problem=_letter_problem,
    ),
    "word": AnswerForm(
        request="the answer in one word",
        closed=True,
        score=lambda answer, gold, tolerance: float(_same_text(answer, gold, tolerance)),
        same=_same_text,
        problem=_no_problem,
    ),
    "number": AnswerForm(
        request="the number with its unit",
        score=lambda answer, gold, tolerance: float(is_within(answer, gold, tolerance)),
        same=is_within,
        problem=quantity_problem,
    ),
    "list": AnswerForm(
        request="all findings, separated by semicolons,",
        score=lambda answer, gold, _: list_f1(answer, gold),
        same=lambda answer, gold, _: list_f1(answer, gold) == 1,
        problem=_list_problem,
    ),
    "text": AnswerForm(request="the answer in a few words", score=_text_score, same=_same_text, problem=_no_problem),
}
