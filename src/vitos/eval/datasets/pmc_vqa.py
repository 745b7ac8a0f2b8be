"""PMC-VQA: multiple choice about figures of papers (`RadGenome/PMC-VQA`).

- `test_2` (default): `test_2.csv` with `index`, `Figure_path`, `Caption`, `Question`, `Choice A` … `Choice D`,
  `Answer` (a letter), `split`; images in `figures/` of `images_2.zip`
- `test`, `test_clean`: `<split>.csv` with `Figure_path`, `Question`, `Answer` (a text), `Choice A` … `Choice D`,
  `Answer_label` (a letter); images in `images/` of `images.zip`

The choices begin with their letters, as in ` A:Diffuse uptake pattern `; the letters are removed. `test_2` is the
version without compound figures, on which medical models are usually compared; `test_clean` was checked by hand.

Verified: files of the repository, the card's row of version 1, columns and `figures/` of version 2 by two programs
that read them. Not verified: that `images.zip` holds `images/` (that, `figures/` and the bare content are read).
"""

from __future__ import annotations

from pathlib import Path

from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, with_options
from vitos.eval.datasets.rows import ReleaseRow, csv_rows, find, text_of


def _archive(split: str) -> str:
    return "images_2.zip" if split.endswith("_2") else "images.zip"


def _release(folder: Path, split: str) -> Release:
    rows = csv_rows(folder, find(folder, f"{split}.csv"))
    return Release(rows, sorted(folder.glob(_archive(split))), ("figures", "images", ""))


def _question(row: ReleaseRow) -> ParsedRow:
    letter = text_of(row, "Answer_label" if "Answer_label" in row else "Answer")
    options = [row.get(f"Choice {place}") for place in "ABCD"]
    text, answer = with_options(text_of(row, "Question"), options, letter=letter)
    images, meta = (text_of(row, "Figure_path"),), {"question_type": "multiple choice"}
    return ParsedRow(text=text, images=images, answer=answer, kind="letter", meta=meta)


BENCHMARK = register(
    Benchmark(
        name="pmc_vqa",
        hub="RadGenome/PMC-VQA",
        files=lambda split: [f"{split}.csv", _archive(split)],
        splits=("test_2", "test", "test_clean"),
        release=_release,
        question=_question,
    )
)
