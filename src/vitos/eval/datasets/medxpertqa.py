"""MedXpertQA, the part with images: 2,000 hard questions of five options (`TsinghuaC3I/MedXpertQA`, config MM).

`MM/<split>.jsonl`, objects with `id`, `question` (which repeats the options after "Answer Choices:"; they are
removed), `options` (letter → text), `label` (a letter), `images` (file names, often several), `medical_task`,
`body_system`, `question_type`; the images in a folder `images/` or in `images.zip`.

Several images precede the question, in order. Boxes and sparse tokens belong to the first one; the others stay whole.

Verified: the files, the fields, `images` as names below the archive, "Answer Choices:" in questions. Not verified:
the folder inside `images.zip` (both `images/` and its bare content are read).
"""

from __future__ import annotations

import re
from pathlib import Path

from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, with_options
from vitos.eval.datasets.rows import ReleaseRow, RowError, find, jsonl_rows, labels, text_of

_CHOICES = re.compile(r"\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)
_LETTERS = "ABCDEFGHIJ"


def _release(folder: Path, split: str) -> Release:
    rows = jsonl_rows(folder, find(folder, f"MM/{split}.jsonl"))
    return Release(rows, sorted(folder.glob("images.zip")), ("images", "", "MM/images"))


def _question(row: ReleaseRow) -> ParsedRow:
    options, images = row.get("options"), row.get("images")
    if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
        raise RowError("options are not an object of texts")
    if unknown := set(options) - set(_LETTERS):
        raise RowError(f"options have the letter {min(unknown)[:40]!r}")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise RowError("images are not a list of names")
    question = _CHOICES.sub("", text_of(row, "question"))
    text, answer = with_options(question, [options.get(letter) for letter in _LETTERS], letter=text_of(row, "label"))
    meta = labels(row, question_type="question_type", subset="medical_task", body_system="body_system")
    return ParsedRow(text=text, images=tuple(images), answer=answer, kind="letter", meta=meta)


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
