"""Where questions come from: record files, and published benchmarks as `benchmark:NAME[@SPLIT][=FOLDER]`.

    benchmark:slake=downloads/slake        benchmark:vqa_rad@train        downloads/my-questions.json

The same words are accepted by `data.eval` of a recipe, `vitos eval --data`, `vitos data check`, `vitos data convert`,
`vitos data cache` and, without the prefix, by `vitos bench run --benchmark`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vitos.data.check import CheckReport, Progress, check_datasets
from vitos.data.convert import write_records
from vitos.data.readers import read_records
from vitos.eval.conditions import EvalSet
from vitos.eval.datasets.loading import LoadedBenchmark, load_benchmark

BENCHMARK = "benchmark:"
NAMED = 20
"""Largest number of left-out rows of a benchmark that are printed; all are kept and counted."""

_log = logging.getLogger(__name__)


def is_benchmark(source: str) -> bool:
    """Whether a source names a benchmark and no file."""
    return source.startswith(BENCHMARK)


def open_benchmark(text: str, limit: int | None = None) -> LoadedBenchmark:
    """Read `NAME[@SPLIT][=FOLDER]`, with or without `benchmark:`; the rows that are left out are named in the log.

    Args:
        text: the split is by default the benchmark's first; without a folder, or with `hub:owner/set`, the hub is
            asked.
        limit: number of rows, from the start; None: all.

    Raises:
        ValueError: for an unknown benchmark or split.
        DataError: if the release cannot be read.
    """
    place, _, folder = text.removeprefix(BENCHMARK).partition("=")
    name, _, split = place.partition("@")
    loaded = load_benchmark(name, folder or None, split or None, limit=limit)
    for row, reason in loaded.left_out[:NAMED]:
        _log.warning("%s: left out %s: %s", name, row, reason)
    if (more := len(loaded.left_out) - NAMED) > 0:
        _log.warning("%s: %d more rows are left out", name, more)
    return loaded


def read_set(source: str, limit: int | None = None) -> EvalSet:
    """The questions of a record file or a benchmark, as one data set with the name of the source.

    Raises:
        ValueError, DataError: as `open_benchmark` and `read_records`.
    """
    if not is_benchmark(source):
        return EvalSet(source, tuple(read_records(source, limit=limit)))
    loaded = open_benchmark(source, limit)
    return EvalSet(source, loaded.records, loaded.left_out)


def convert_benchmark(source: str, target_dir: Path, limit: int | None = None) -> int:
    """Write the questions of a benchmark as records with image files; returns their number.

    Raises:
        DataError: as `convert`.
    """
    loaded = open_benchmark(source, limit)
    return write_records({loaded.split: loaded.records}, target_dir)


def check_sources(
    sources: Sequence[str], splits: Sequence[str] | None = None, progress: Progress | None = None
) -> list[CheckReport]:
    """`check_datasets` of record files and benchmarks; the reports of benchmarks come last.

    Raises:
        ValueError, DataError: as `open_benchmark` and `check_datasets`.
    """
    loaded = {source: open_benchmark(source).records for source in sources if is_benchmark(source)}
    files = [index for index, source in enumerate(sources) if source not in loaded]
    named = [index for index, source in enumerate(sources) if source in loaded]
    known = None if splits is None else [splits[index] for index in (*files, *named)]
    return check_datasets([sources[index] for index in files], splits=known, loaded=loaded, progress=progress)
