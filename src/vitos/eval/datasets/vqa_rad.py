"""VQA-RAD: 2,244 questions about radiology images, 451 in the test split.

Two layouts are read. `flaviagiammarino/vqa-rad` on the hub: parquet in `data/`, columns `image` (struct<bytes, path>),
`question`, `answer`, no answer type: a question is closed if its answer is yes or no, which is how its card scores it
too. Or `<split>.json` with `image` (a file below the folder), `question`, `answer`, `answer_type` (CLOSED or OPEN),
`question_type`, `organ`, `phrase_type`, as the authors' own release has them; closed questions without yes or no ask
for the word.

All but one of the test images are also train images. Where the folder has `heldout_images.json`, a list of names,
`train_by_image` and `test_by_image` share no image: the train questions about other images, and all questions about
these.

Verified: the columns and the card's text; the second layout on all of its rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vitos.core.record import AnswerKind
from vitos.data.images import DataError
from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, yes_no_or
from vitos.eval.datasets.rows import (
    Damage,
    NamedRow,
    ReleaseRow,
    RowError,
    find,
    image_of,
    json_rows,
    labels,
    parquet_rows,
    text_of,
)

HELD_OUT = "heldout_images.json"
_BY_IMAGE = "_by_image"


def parquet_release(folder: Path, split: str) -> Release:
    """A split in `data/<split>-*.parquet`, or at the top of the folder if a user keeps only the shards."""
    files = find(folder, f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    return Release(parquet_rows(folder, files))


def open_or_yes_no(row: ReleaseRow) -> ParsedRow:
    """A row of `image`, `question` and `answer`."""
    text, answer, kind = yes_no_or("text", text_of(row, "question"), text_of(row, "answer"))
    meta = {"question_type": "yes/no" if kind == "letter" else "open"}
    return ParsedRow(text=text, images=(image_of(row),), answer=answer, kind=kind, meta=meta)


def _release(folder: Path, split: str) -> Release:
    if not any(folder.glob("*.json")):
        return parquet_release(folder, split)
    if not split.endswith(_BY_IMAGE):
        return Release(json_rows(folder, find(folder, f"{split}.json")))
    return Release(_by_image(folder, split.removesuffix(_BY_IMAGE)))


def _by_image(folder: Path, split: str) -> Iterator[NamedRow]:
    """The rows of `train.json` about images that are not held out, or those of both files about the others."""
    (file,) = find(folder, HELD_OUT)
    held_out = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(held_out, list) or not all(isinstance(name, str) for name in held_out):
        raise DataError(f"{file}: holds no list of image names; get it again")
    files = find(folder, "train.json") + (find(folder, "test.json") if split == "test" else [])
    names = set(held_out)
    for name, row in itertools.chain.from_iterable(json_rows(folder, [one]) for one in files):
        image = "" if isinstance(row, Damage) else PurePosixPath(str(row.get("image"))).name
        if isinstance(row, Damage) or (image in names) == (split == "test"):
            yield name, row


def _question(row: ReleaseRow) -> ParsedRow:
    if "answer_type" not in row:
        return open_or_yes_no(row)
    kinds: dict[str, AnswerKind] = {"CLOSED": "word", "OPEN": "text"}
    answer_type = text_of(row, "answer_type").upper()
    if answer_type not in kinds:
        raise RowError(f"answer_type is {answer_type[:40]!r}, neither CLOSED nor OPEN")
    text, answer, kind = yes_no_or(kinds[answer_type], text_of(row, "question"), text_of(row, "answer"))
    meta = labels(row, question_type="question_type", subset="organ", phrase_type="phrase_type")
    meta |= {"answer_type": answer_type}
    return ParsedRow(text=text, images=(text_of(row, "image"),), answer=answer, kind=kind, meta=meta)


BENCHMARK = register(
    Benchmark(
        name="vqa_rad",
        hub="flaviagiammarino/vqa-rad",
        files=lambda split: [f"data/{split}-*.parquet"],
        splits=("test", "train", f"test{_BY_IMAGE}", f"train{_BY_IMAGE}"),
        release=_release,
        question=_question,
    )
)
