"""PathVQA: 32,632 questions about pathology images, 6,719 in the test split (`flaviagiammarino/path-vqa`).

Layout and treatment are those of VQA-RAD, with a third split `validation` and several shards per split.

Verified: the counts (card). Not verified: that the columns are those of VQA-RAD.
"""

from __future__ import annotations

from vitos.eval.datasets.loading import Benchmark, register
from vitos.eval.datasets.vqa_rad import open_or_yes_no, parquet_release

BENCHMARK = register(
    Benchmark(
        name="path_vqa",
        hub="flaviagiammarino/path-vqa",
        files=lambda split: [f"data/{split}-*.parquet"],
        splits=("test", "validation", "train"),
        release=parquet_release,
        question=open_or_yes_no,
    )
)
