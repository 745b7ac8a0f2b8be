"""Right, wrong or no answer, under one of two protocols.

- `choice`: closed questions only, those with options and those that ask for one word. Right is the letter of the
  right option, or exactly its text; for a word, exactly that word.
- `open`: every question. Those with options as above; a word, a list or a free text is right if it is the same as an
  accepted answer after `normalize_answer`, a number if it is within its tolerance.

Each answer also has a score, 0..1, the one that training rewards (`vitos.core.answers`): partly right lists and texts
have a part of it. What another model makes of an answer is another figure (`vitos.eval.judged`).

Nothing is guessed: what cannot be read, is hedged or is taken back is NO_ANSWER, a third verdict, and not correct.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vitos.core.answers import FORMS, is_right, score_answer_text, token_f1
from vitos.core.choice import name_option
from vitos.core.record import Record
from vitos.core.response import parse_reasoning, read_answer_text
from vitos.core.wording import normalize_answer as normalize_answer

Protocol = Literal["choice", "open"]


class Verdict(StrEnum):
    """What became of a question. No answer is a third verdict, not a wrong letter (docs/method.md, section 5)."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """What was read from one completion, and what it is worth.

    Attributes:
        answer: the letter, or the text as written; None if none could be read.
        token_f1: overlap with the best of the accepted texts, 0..1; None for questions with options. 0 without an
            answer.
        score: what the answer is worth, 0..1, as in training; 1 or 0 for letters, words and numbers.
    """

    answer: str | None
    verdict: Verdict
    token_f1: float | None = None
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of `count` >= 1 questions.

    Attributes:
        accuracy: share of correct answers, 0..1; a question without an answer is not correct.
        no_answer_rate: share of questions without an answer, 0..1.
    """

    count: int
    accuracy: float
    no_answer_rate: float


def in_protocol(record: Record, protocol: Protocol) -> bool:
    """Whether a protocol asks this question."""
    return protocol == "open" or FORMS[record.kind].closed


def score_answer(text: str, record: Record) -> ScoredAnswer:
    """Read a completion's answer to a question and score it; needs no model, so stored texts can be scored again.

    Raises:
        ValueError: if the gold answer is blank.
    """
    if record.kind == "letter":
        letter = choose_option(text, record.options)
        verdict = score_choice(letter, record.answer)
        return ScoredAnswer(letter, verdict, score=float(verdict is Verdict.CORRECT))
    if not record.answer.strip():
        raise ValueError(f"{record.id}: the gold answer is blank; check the `answer` field of the record")
    answer = read_answer_text(text)
    if answer is None:
        return ScoredAnswer(None, Verdict.NO_ANSWER, 0.0)
    verdict = Verdict.CORRECT if is_right(answer, record) else Verdict.WRONG
    f1 = max(token_f1(answer, gold) for gold in record.golds)
    return ScoredAnswer(answer, verdict, f1, score_answer_text(answer, record))


def choose_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a completion answers with: as `parse_reasoning` reads it, as in training, or else by the text of
    one option after `normalize_answer`, also without tags, as models answer that were not trained here.

    >>> choose_option("The answer is (B).", {"A": "< 5 mm", "B": "> 5 mm"})
    'B'
    >>> choose_option(">5 mm", {"A": "< 5 mm", "B": "> 5 mm"})
    'B'
    >>> choose_option("B. < 5 mm", {"A": "< 5 mm", "B": "> 5 mm"}) is None
    True

    Args:
        options: letter → text; empty if they are not known: any letter.
    """
    letter = parse_reasoning(text, options).answer
    written = read_answer_text(text)
    return letter if letter is not None or written is None else name_option(written, options)


def score_choice(answer: str | None, gold: str) -> Verdict:
    """Compare a parsed answer with the letter of the right option; case and surrounding blanks do not count.

    Nothing is guessed: "B) cyst" is not "B". Taking the letter out of a text is the parser's work
    (`vitos.core.response`).

    Args:
        answer: what the model answered; None or blank if no answer could be parsed.

    Raises:
        ValueError: if `gold` is blank.
    """
    if not gold.strip():
        raise ValueError("the gold answer is blank; check the `answer` field of the record")
    if answer is None or not answer.strip():
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if answer.strip().casefold() == gold.strip().casefold() else Verdict.WRONG


def aggregate(verdicts: Iterable[Verdict]) -> Score:
    """Accuracy and no-answer rate over all questions.

    Raises:
        ValueError: if there is no question.
    """
    all_verdicts = list(verdicts)
    count = len(all_verdicts)
    if count == 0:
        raise ValueError("no verdicts to aggregate; the data set or the filter on it is empty")
    return Score(
        count=count,
        accuracy=all_verdicts.count(Verdict.CORRECT) / count,
        no_answer_rate=all_verdicts.count(Verdict.NO_ANSWER) / count,
    )
