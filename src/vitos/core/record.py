"""One question about an image: the record that every reader yields and every consumer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vitos.core.geometry import Box
from vitos.core.numbering import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
from vitos.core.options import option_lines as option_lines
from vitos.core.options import read_choices, same_texts

AnswerKind = Literal["letter", "word", "number", "list", "text"]
"""What an answer is: the letter of an inline option, the word of a closed question without options, a number with its
unit, a list of findings, or free text; `vitos.core.answers` says how each is asked for and scored."""


@dataclass(frozen=True, slots=True)
class Record:
    """A question with its image(s), its answer and, where known, the boxes of its evidence.

    >>> from pathlib import Path
    >>> from vitos import Record
    >>> question = "<image>What is shown?\\nA. cyst\\nB. nodule"
    >>> Record("r1", (Path("/data/r1.png"),), question, "B", boxes=(Box(0.1, 0.2, 0.3, 0.4),)).options
    {'A': 'cyst', 'B': 'nodule'}

    Attributes:
        id: unique within its data set; named in every error about the record.
        image_paths: absolute paths, all below the data set's root, with a selector (`scan.dcm#frame=3`) where the
            file holds more than one picture. `Box.image` is a place in this list, from 1.
        question: text with one `<image>` for each image, options inline.
        answer: the letter of the right option, or as `kind` says.
        boxes: gold evidence, or None where the data set has none (then the IoU reward abstains).
        meta: free text fields for tables, such as `template`.
        kind: what the answer is.
        accepted: further answers that are as right as `answer`.
        tolerance: for a number, how far an answer may be from it: "2 mm" or "10 %"; empty: not at all.
    """

    id: str
    image_paths: tuple[Path, ...]
    question: str
    answer: str
    boxes: tuple[Box, ...] | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    kind: AnswerKind = "letter"
    accepted: tuple[str, ...] = ()
    tolerance: str = ""

    @property
    def golds(self) -> tuple[str, ...]:
        """All answers that are right, the one to be learned first."""
        return (self.answer, *self.accepted)

    @property
    def options(self) -> dict[str, str]:
        """Inline options of the question, letter → text; empty where the answer is no letter."""
        return parse_options(self.question) if self.kind == "letter" else {}


def parse_options(question: str) -> dict[str, str]:
    """The options written in a question, letter → text, in order; {} if there are none or it is not clear which.

    `vitos.core.options.read_choices` says what is read.

    >>> parse_options("What is it? A. cyst B. mass Answer with the option's letter.")
    {'A': 'cyst', 'B': 'mass'}
    """
    return dict(read_choices(question).options)


def option_problems(question: str) -> tuple[str, ...]:
    """What is doubtful about a question's options, each as the end of a sentence; () if nothing is.

    Such a question is not for training: an option with a line break, a letter twice, a text twice, two lists.

    >>> option_problems("What is it?\\nA. cyst\\nB. Cyst.")
    ('has the same text for the options A and B',)
    """
    choices = read_choices(question)
    return (*choices.problems, *same_texts(choices.options))


def spell_answer(question: str, answer: str) -> str:
    """An option's letter with its text, "B. cyst"; an answer that is no letter of the question as it is."""
    option = parse_options(question).get(answer)
    return f"{answer}. {option}" if option else answer
