"""MedXpertQA, the part with images: 2,000 hard questions of five options (`TsinghuaC3I/MedXpertQA`, config MM).

`MM/<split>.jsonl`, objects with `id`, `question` (the options once more at its end, behind "Answer Choices:"; taken
off), `options` (letter → text), `label` (a letter), `images` (file names, often several), `medical_task`,
`body_system`, `question_type`; the images in `images/`, as it is or in `images.zip`.

Several images are placed in front of the question, in order. Boxes and sparse tokens are of the first one; the others
are whole.

Verified: the files, the fields, `images` as names below the archive, "Answer Choices:" in questions. Not verified:
the folder inside `images.zip` (`images/` and its content alone are read).
"""

from __future__ import annotations

import re
from pathlib import Path

from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import Question, with_options
from vitos.eval.datasets.rows import Row, RowError, find, jsonl_rows, labels, text_of

_CHOICES = re.compile(r"\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)
_LETTERS = "ABCDEFGHIJ"


def _release(folder: Path, split: str) -> Release:
    rows = jsonl_rows(folder, find(folder, f"MM/{split}.jsonl"))
    return Release(rows, sorted(folder.glob("images.zip")), ("images", "", "MM/images"))


def _question(row: Row) -> Question:
    options, images = row.get("options"), row.get("images")
    if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
        raise RowError("options are no object of texts")
    if unknown := set(options) - set(_LETTERS):
        raise RowError(f"options have the letter {min(unknown)[:40]!r}")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise RowError("images are no list of names")
    question = _CHOICES.sub("", text_of(row, "question"))
    text, answer = with_options(question, [options.get(letter) for letter in _LETTERS], letter=text_of(row, "label"))
    meta = labels(row, question_type="question_type", subset="medical_task", body_system="body_system")
    return Question(text, tuple(images), answer, "letter", meta)


BENCHMARK = register(
    Benchmark(
        name="medxpertqa",
        hub="TsinghuaC3I/MedXpertQA",
        files=lambda split: [f"MM/{split}.jsonl", "images.zip"],
        splits=("test", "dev"),
        release=_release,
        question=_question,
    )
)
