"""One question about an image: the record that every reader yields and every consumer takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vitos.geometry import Box

IMAGE_PLACEHOLDER = "<image>"

# "A) nodule", "B. cyst", "(C) mass": a letter, its closing mark, then the text up to the next option.
_OPTION = re.compile(r"(?:^|[\s(])([A-Z])[).:]\s*(.+?)\s*(?=(?:[\s(][A-Z][).:]\s)|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Record:
    """A question with its image(s), its answer and, where known, the boxes of its evidence.

    Attributes:
        id: unique within its data set; named in every error about the record.
        image_paths: absolute paths, all below the data set's root, with a selector (`scan.dcm#frame=3`) where the
            file holds more than one picture. Evidence boxes refer to the first image.
        question: text with one `<image>` for each image, options inline.
        answer: the letter of the right option.
        boxes: gold evidence, or None where the data set has none (then the IoU reward abstains).
        meta: free text fields for tables, such as `template`.
    """

    id: str
    image_paths: tuple[Path, ...]
    question: str
    answer: str
    boxes: tuple[Box, ...] | None = None
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, str]:
        """Inline options of the question, letter → text; empty for an open question."""
        return parse_options(self.question)


def parse_options(question: str) -> dict[str, str]:
    """Options written inline as `A) text`, `A. text` or `(A) text`, in order; {} unless they start at A and run on.

    A list whose letters do not read A, B, C … is no option list (the "C." of "vitamin C. deficiency" is not one).
    """
    found = _OPTION.findall(question)
    options: dict[str, str] = {}
    for letter, text in found:
        if letter == chr(ord("A") + len(options)):
            options[letter] = text.strip()
    return options if len(options) >= 2 else {}
