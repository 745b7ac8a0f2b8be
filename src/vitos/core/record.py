"""One question about an image: the record that every reader yields and every consumer takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from vitos.core.geometry import Box

IMAGE_PLACEHOLDER = "<image>"

AnswerKind = Literal["letter", "word", "text"]
"""What an answer is: the letter of an inline option, the word of a closed question without options, or free text."""

# "A) nodule", "B. cyst", "(C) mass": a letter, its closing mark, then the text up to the next option.
_OPTION = re.compile(r"(?:^|[\s(])([A-Z])[).:]\s*(.+?)\s*(?=(?:[\s(][A-Z][).:]\s)|$)", re.DOTALL)
# The same with every option on a line of its own: whatever looks like a letter inside an option's text stays in it.
_LINE_OPTION = re.compile(r"^\(?([A-Z])[).:][ \t]*(\S.*?)\s*(?=^\(?[A-Z][).:][ \t]*\S|\Z)", re.DOTALL | re.MULTILINE)


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
            file holds more than one picture. Evidence boxes refer to the first image.
        question: text with one `<image>` for each image, options inline.
        answer: the letter of the right option, or as `kind` says.
        boxes: gold evidence, or None where the data set has none (then the IoU reward abstains).
        meta: free text fields for tables, such as `template`.
        kind: what the answer is. Training needs letters; benchmarks also ask for words and texts.
    """

    id: str
    image_paths: tuple[Path, ...]
    question: str
    answer: str
    boxes: tuple[Box, ...] | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    kind: AnswerKind = "letter"

    @property
    def options(self) -> dict[str, str]:
        """Inline options of the question, letter → text; empty where the answer is no letter."""
        return parse_options(self.question) if self.kind == "letter" else {}


def parse_options(question: str) -> dict[str, str]:
    """Options written inline as `A) text`, `A. text` or `(A) text`, in order; {} unless they start at A and run on.

    A list whose letters do not read A, B, C … is no option list (the "C." of "vitamin C. deficiency" is not one).
    Options on lines of their own are read line by line, so that "A. vitamin B. complex" is one option.
    """
    for pattern in (_LINE_OPTION, _OPTION):
        options: dict[str, str] = {}
        for letter, text in pattern.findall(question):
            if letter == chr(ord("A") + len(options)):
                options[letter] = text.strip()
        if len(options) >= 2:
            return options
    return {}


def spell_answer(question: str, answer: str) -> str:
    """An option's letter with its text, "B. cyst"; an answer that is no letter of the question as it is."""
    option = parse_options(question).get(answer)
    return f"{answer}. {option}" if option else answer


def option_lines(options: Sequence[str]) -> str:
    """Options with their letters, each on a line that begins with a line break; `parse_options` reads them back.

    Raises:
        ValueError: for more than 26 options.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options, but there are {len(ascii_uppercase)} letters")
    return "".join(f"\n{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
