"""MMMU, the five subjects of Health & Medicine (`MMMU/MMMU`).

Parquet by subject, `<subject>/<split>-*.parquet`; columns `id`, `question` with `<image 1>` where the first image
belongs (also inside options, and more than once), `options` (a list printed as a string), `image_1` … `image_7`
(struct<bytes, path> or null), `answer` (a letter; for open questions a text or a printed list of texts),
`question_type` (`multiple-choice` or `open`), `img_type` (a printed list), `subfield`, `topic_difficulty`,
`explanation`.

The answers of the split `test` are not public (`?`), so `validation` is the default: 150 questions in the five
subjects. An image called again is "image 1" in words. Open questions with several right answers are left out.

Verified: the columns and their types (card), the subjects' names. Not verified: `options` as a printed list, and the
shards' names below a subject (the hub's usual ones are read).
"""

from __future__ import annotations

import ast
import re
from itertools import chain
from pathlib import Path

from vitos.core.record import IMAGE_PLACEHOLDER, AnswerKind
from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, with_options
from vitos.eval.datasets.rows import ReleaseRow, RowError, find, image_of, labels, parquet_rows, text_of

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
MAX_IMAGES = 7
_CALL = re.compile(r"<image (\d)>")


def _release(folder: Path, split: str) -> Release:
    parts = [parquet_rows(folder, find(folder, f"{subject}/{split}-*.parquet")) for subject in SUBJECTS]
    return Release(chain.from_iterable(parts))


def _question(row: ReleaseRow) -> ParsedRow:
    answer, options = text_of(row, "answer"), _printed_list(row, "options")
    kind: AnswerKind = "letter"
    if answer == "?":
        raise RowError("has no public answer; use the split validation")
    if row.get("question_type") == "multiple-choice":
        text, answer = with_options(text_of(row, "question"), options, letter=answer)
    elif row.get("question_type") == "open":
        text, kind = text_of(row, "question"), "text"
        if answer.startswith("["):
            raise RowError("has several right answers")
    else:
        raise RowError(f"question_type is {str(row.get('question_type'))[:40]!r}, neither multiple-choice nor open")
    text, images = _place(text, row)
    meta = labels(row, question_type="question_type", subfield="subfield", difficulty="topic_difficulty")
    meta["subset"] = _subject(row)
    if kinds := _printed_list(row, "img_type"):
        meta["modality"] = ", ".join(kinds)
    return ParsedRow(text=text, images=images, answer=answer, kind=kind, meta=meta)


def _place(text: str, row: ReleaseRow) -> tuple[str, tuple[bytes, ...]]:
    """The text with `<image>` for the first call of each image, and the images in this order; uncalled ones first."""
    there = [n for n in range(1, MAX_IMAGES + 1) if row.get(f"image_{n}") is not None]
    called = list(dict.fromkeys(int(number) for number in _CALL.findall(text)))
    seen: set[str] = set()

    def show(match: re.Match[str]) -> str:
        again = match[1] in seen
        seen.add(match[1])
        return f"image {match[1]}" if again else IMAGE_PLACEHOLDER

    order = [n for n in there if n not in called] + called
    return _CALL.sub(show, text), tuple(image_of(row, f"image_{number}") for number in order)


def _printed_list(row: ReleaseRow, column: str) -> list[str]:
    """A list of texts printed as a string, as `["CT scan", 'MRI']`; [] where the column is null or blank."""
    text = row.get(column)
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    try:
        values = ast.literal_eval(text) if isinstance(text, str) and len(text) < 100_000 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise RowError(f"{column} is not a printed list of texts")
    return values


def _subject(row: ReleaseRow) -> str:
    """The subject, from the id `validation_Clinical_Medicine_12`: the rows have no column for it."""
    identity = text_of(row, "id")
    found = [subject for subject in SUBJECTS if f"_{subject}_" in identity]
    if not found:
        raise RowError(f"id {identity[:40]!r} names no subject of Health & Medicine")
    return found[0]


BENCHMARK = register(
    Benchmark(
        name="mmmu_medical",
        hub="MMMU/MMMU",
        files=lambda split: [f"{subject}/{split}-*.parquet" for subject in SUBJECTS],
        splits=("validation", "dev", "test"),
        release=_release,
        question=_question,
    )
)
