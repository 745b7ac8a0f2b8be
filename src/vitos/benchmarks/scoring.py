"""Right, wrong or no answer: the score of a multiple-choice question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What became of a question. A missing answer is a class of its own, not a wrong letter (algorithm.md §5)."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"


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


def score_choice(answer: str | None, gold: str) -> Verdict:
    """Compare a parsed answer with the letter of the right option; case and surrounding blanks do not count.

    Nothing is guessed: "B) cyst" is not "B". Taking the letter out of a text is the parser's work (`vitos.response`).

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
