"""Benchmarks by name: a public release on disk or on the hub → records, and which rows were left out and why.

    loaded = load_benchmark("vqa_rad", "downloads/vqa-rad")
    loaded.records, loaded.left_out

A benchmark is a file that says where its rows and images are and what one row means, and calls `register`. Rows that
cannot be used are left out, named and counted, and never change what the others are called.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitos.core.record import Record
from vitos.data.images import DataError
from vitos.data.readers import HUB_PREFIX
from vitos.eval.datasets.pictures import Pictures
from vitos.eval.datasets.questions import Question, place_images
from vitos.eval.datasets.rows import Damage, NamedRow, Row, RowError

BUILT_IN = ("vqa_rad", "slake", "path_vqa", "pmc_vqa", "omnimedvqa", "mmmu_medical", "medxpertqa", "medical_bundle")
_THREADS = 4
_AT_ONCE = 64  # rows in memory: those of parquet hold their images

_REGISTERED: dict[str, Benchmark] = {}


@dataclass(frozen=True, slots=True)
class Release:
    """Where one split of a benchmark is, in a folder as published.

    Attributes:
        rows: the rows, read lazily.
        archives: zip files with images.
        inside: folders in which the rows' image names are looked up, in the folder and in the archives.
    """

    rows: Iterable[NamedRow]
    archives: Sequence[Path] = ()
    inside: Sequence[str] = ("",)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: the name of its file, by which it is called.
        hub: its data set on the hub.
        files: the patterns of the files that a split needs.
        splits: the names of its splits, the default first.
        release: a function that finds a split in a folder; `DataError` if it is not there.
        question: a function that reads a row; `RowError` if the row cannot become a question.
    """

    name: str
    hub: str
    files: Callable[[str], Sequence[str]]
    splits: tuple[str, ...]
    release: Callable[[Path, str], Release]
    question: Callable[[Row], Question]


class LeftOut(NamedTuple):
    """A part of a release that cannot be used.

    Attributes:
        row: name of the row, of a range of rows that could not be decoded, or of a file.
        reason: why, as the end of a sentence about it.
    """

    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedBenchmark:
    """The usable questions of one split, and those that are not.

    Attributes:
        records: ids are `<name>/<row>`; `meta` has `question_type`, `modality` and `subset` where the release does.
        left_out: all that cannot be used, in the order of the release.
    """

    name: str
    split: str
    source: str
    records: tuple[Record, ...]
    left_out: tuple[LeftOut, ...]


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name; the last of a name counts."""
    _REGISTERED[benchmark.name] = benchmark
    return benchmark


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        ValueError: for an unknown one; it lists the known.
    """
    if name not in _REGISTERED and name in BUILT_IN:
        importlib.import_module(f"vitos.eval.datasets.{name}")
    if name not in _REGISTERED:
        known = ", ".join(dict.fromkeys([*BUILT_IN, *_REGISTERED]))
        raise ValueError(f"there is no benchmark {name!r}; known are {known}")
    return _REGISTERED[name]


def load_benchmark(
    name: str,
    source: str | Path | None = None,
    split: str | None = None,
    *,
    limit: int | None = None,
    store: str | Path | None = None,
) -> LoadedBenchmark:
    """Read one split of a benchmark.

    Args:
        source: a folder with the release as published, archives unpacked or not, or `hub:owner/name`, which is
            downloaded (or found in the cache of `huggingface_hub`, when offline); by default the hub.
        split: name of a split; by default the benchmark's first.
        limit: number of rows to read, from the first; by default all.
        store: folder for images out of parquet and zip files; by default in the user's cache. All benchmarks may
            share it, and it may be deleted when no run needs it.

    Raises:
        DataError: if the folder does not hold the split, an archive must not be unpacked, or no row is usable.
        ValueError: for an unknown benchmark or split, or a limit below 1.
    """
    benchmark = get_benchmark(name)
    split = split or benchmark.splits[0]
    if split not in benchmark.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(benchmark.splits)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    source = f"{HUB_PREFIX}{benchmark.hub}" if source is None else str(source)
    folder = _folder(source, benchmark.files(split))
    release = benchmark.release(folder, split)
    pictures = Pictures(folder, release.archives, release.inside, Path(store).expanduser() if store else None)
    records: list[Record] = []
    left_out: list[LeftOut] = []
    try:
        rows = itertools.islice(release.rows, limit)
        for row, outcome in _read(benchmark, rows, pictures):
            if isinstance(outcome, Record):
                records.append(outcome)
            else:
                left_out.append(LeftOut(row, outcome.reason))
    finally:
        pictures.close()
    if not records:
        first = "; ".join(f"{row}: {reason}" for row, reason in left_out[:3]) or "there are no rows"
        raise DataError(f"{source}: no question of {name}, {split} can be used ({first})")
    return LoadedBenchmark(name, split, source, tuple(records), tuple(left_out))


def _read(benchmark: Benchmark, rows: Iterator[NamedRow], pictures: Pictures) -> Iterator[tuple[str, Record | Damage]]:
    """Rows → records, images checked in a few threads, in order."""

    def read(named: NamedRow) -> Record | Damage:
        name, row = named
        if isinstance(row, Damage):
            return row
        try:
            return _record(f"{benchmark.name}/{name}", benchmark.question(row), pictures)
        except RowError as error:
            return Damage(str(error))

    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(itertools.islice(rows, _AT_ONCE)):
            for (name, _), outcome in zip(batch, pool.map(read, batch), strict=True):
                yield name, outcome


def _record(name: str, question: Question, pictures: Pictures) -> Record:
    if not question.images:
        raise RowError("has no image")
    text = place_images(question.text, len(question.images))
    paths = tuple(pictures.get(image) for image in question.images)
    return Record(name, paths, text, question.answer, None, question.meta, question.kind)


def _folder(source: str, patterns: Sequence[str]) -> Path:
    if source.startswith(HUB_PREFIX):
        from huggingface_hub import snapshot_download  # network and access errors are its own

        name = source.removeprefix(HUB_PREFIX)
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the release, or {HUB_PREFIX}owner/name")
    return folder
