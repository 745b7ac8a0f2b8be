"""Benchmarks by name: from a public release on disk or on the hub to records, and to rows that were left out and why.

    loaded = load_benchmark("vqa_rad", "downloads/vqa-rad")
    loaded.records, loaded.left_out

Rows that cannot be used are left out, named and counted, and never change the names of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vitos.core.record import Record
from vitos.core.registry import Registry
from vitos.data.images import DataError
from vitos.data.readers import HUB_PREFIX
from vitos.eval.datasets.pictures import Pictures
from vitos.eval.datasets.questions import ParsedRow, place_images
from vitos.eval.datasets.rows import Damage, NamedRow, ReleaseRow, RowError

DATASETS = Registry("vitos.eval.datasets", "vitos.datasets", helpers=("loading", "pictures", "questions", "rows"))
"""Files with a benchmark, by name. The helpers define none."""

_THREADS = 4
_AT_ONCE = 64  # rows in memory: those of parquet hold their images

_REGISTERED: dict[str, Benchmark] = {}


@dataclass(frozen=True, slots=True)
class Release:
    """Where one split of a benchmark is, in a folder as published.

    Attributes:
        rows: the rows, read lazily.
        archives: zip files with images.
        inside: folders in which image names are looked up, in the release and in the archives.
    """

    rows: Iterable[NamedRow]
    archives: Sequence[Path] = ()
    inside: Sequence[str] = ("",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Where the rows and images of a benchmark are, and what one row means.

    Attributes:
        name: name of the benchmark: that of its file or entry point.
        hub: data set on the Hugging Face hub, as `owner/name`.
        files: gives the patterns of the files to download for a split.
        splits: names of its splits; the first is the default.
        release: finds a split in a folder; raises `DataError` if it is not there.
        question: reads a row; raises `RowError` if it makes no question.
    """

    name: str
    hub: str
    files: Callable[[str], Sequence[str]]
    splits: tuple[str, ...]
    release: Callable[[Path, str], Release]
    question: Callable[[ReleaseRow], ParsedRow]


class LeftOut(NamedTuple):
    """A part of a release that cannot be used.

    Attributes:
        row: name of the row, of a range of rows that could not be decoded, or of a file.
        reason: why, as the end of a sentence about it.
    """

    row: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBenchmark:
    """The usable questions of one split, and the rows that cannot be used.

    Attributes:
        name, split, source: benchmark, split, and folder or `hub:owner/name`.
        records: the questions, with ids `<name>/<row>`; `meta` has `question_type`, `modality` and `subset` if the
            release has them.
        left_out: all that cannot be used, in the order of the release.
    """

    name: str
    split: str
    source: str
    records: tuple[Record, ...]
    left_out: tuple[LeftOut, ...]


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name, until another of the same name is registered."""
    _REGISTERED[benchmark.name] = benchmark
    return benchmark


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by its name; only its own module is imported.

    Example:
        >>> get_benchmark("slake").splits
        ('test', 'validation', 'train')

    Raises:
        ValueError: for an unknown name; the message lists those that there are.
    """
    if name not in _REGISTERED:
        found = DATASETS.names()
        if name not in found:
            known = ", ".join(sorted({*found, *_REGISTERED}))
            raise ValueError(f"there is no benchmark {name!r}; known are {known}")
        module = DATASETS.module(name)
        if name not in _REGISTERED:
            raise ValueError(
                f"{module.__name__} registers no benchmark {name!r}; call `register` there with this name "
                f"({DATASETS.group})"
            )
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
        name: name of the benchmark.
        source: folder with the release as published, archives unpacked or not, or `hub:owner/name`, which is
            downloaded (or found in the cache of `huggingface_hub` when offline); None: the benchmark's own on the hub.
        split: name of the split; None: the benchmark's first.
        limit: number of rows, from the start; None: all.
        store: folder for images from parquet and zip files; None: a folder in the user's cache. All benchmarks may
            share it, and it may be deleted when no run needs it.

    Raises:
        DataError: if the folder does not hold the split, an archive is not safe to unpack, or no row can be used.
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
    return LoadedBenchmark(name=name, split=split, source=source, records=tuple(records), left_out=tuple(left_out))


def _read(benchmark: Benchmark, rows: Iterator[NamedRow], pictures: Pictures) -> Iterator[tuple[str, Record | Damage]]:
    """Records from rows, in order; a few threads check the images."""

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


def _record(name: str, question: ParsedRow, pictures: Pictures) -> Record:
    if not question.images:
        raise RowError("has no image")
    text = place_images(question.text, len(question.images))
    paths = tuple(pictures.get(image) for image in question.images)
    return Record(name, paths, text, question.answer, None, question.meta, question.kind)


def _folder(source: str, patterns: Sequence[str]) -> Path:
    if source.startswith(HUB_PREFIX):
        from huggingface_hub import snapshot_download  # its network and access errors are clear

        name = source.removeprefix(HUB_PREFIX)
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the release, or {HUB_PREFIX}owner/name")
    return folder
