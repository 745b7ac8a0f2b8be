"""VQA-RAD: 2,244 questions about radiology images, 451 in the test split (`flaviagiammarino/vqa-rad`).

Parquet in `data/`, splits `train` and `test`; columns `image` (struct<bytes, path>), `question`, `answer`. The hub's
version has no answer type: a question is closed if its answer is yes or no, which is how its card scores it too.

Verified: the columns and the card's text.
"""

from __future__ import annotations

from pathlib import Path

from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, yes_no_or
from vitos.eval.datasets.rows import ReleaseRow, find, image_of, parquet_rows, text_of


def parquet_release(folder: Path, split: str) -> Release:
    """A split in `data/<split>-*.parquet`, or at the top of the folder if a user keeps only the shards."""
    files = find(folder, f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    return Release(parquet_rows(folder, files))


def open_or_yes_no(row: ReleaseRow) -> ParsedRow:
    """A row of `image`, `question` and `answer`."""
    text, answer, kind = yes_no_or("text", text_of(row, "question"), text_of(row, "answer"))
    meta = {"question_type": "yes/no" if kind == "letter" else "open"}
    return ParsedRow(text=text, images=(image_of(row),), answer=answer, kind=kind, meta=meta)


BENCHMARK = register(
    Benchmark(
        name="vqa_rad",
        hub="flaviagiammarino/vqa-rad",
        files=lambda split: [f"data/{split}-*.parquet"],
        splits=("test", "train"),
        release=parquet_release,
        question=open_or_yes_no,
    )
)
