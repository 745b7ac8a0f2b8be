"""What `vitos bench run` and `vitos bench rescore` do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitos.data.readers import read_records
from vitos.eval.datasets.loading import load_benchmark
from vitos.eval.figures import figures
from vitos.eval.plan import BenchSet
from vitos.eval.report import write_report
from vitos.eval.store import BenchFolder

NAMED = 20
"""Rows left out of a benchmark that the log names, at most; all are counted in the results."""

_log = logging.getLogger(__name__)


def rescore(out: Path, base: str | None = None, bootstrap_samples: int = 10_000) -> dict[str, Any]:
    """Make all figures and tables of a bench anew from its stored answers, without a model.

    Raises:
        ValueError: if `out` holds no bench, a line of it is damaged, or there is no model `base`.
    """
    results = figures(BenchFolder(out), base=base, bootstrap_samples=bootstrap_samples)
    write_report(out, results)
    return results


def read_sets(data: Sequence[str], benchmarks: Sequence[str], limit: int | None = None) -> list[BenchSet]:
    """Record files and benchmarks by name.

    Args:
        data: record files, as `file.json` or `name=file.json`; by default they are called by the file's own name.
        benchmarks: `name`, `name=folder` or `name=hub:owner/set`.
        limit: only the first so many rows of each.

    Raises:
        ValueError: if two have the same name, or none is given.
        DataError: if one cannot be read.
    """
    sets = []
    for spec in data:
        name, equals, source = spec.partition("=")
        source = source if equals else spec
        records = tuple(read_records(source, limit=limit))
        sets.append(BenchSet(name if equals else Path(source).stem, records))
    for spec in benchmarks:
        name, _, source = spec.partition("=")
        loaded = load_benchmark(name, source or None, limit=limit)
        for row, reason in loaded.left_out[:NAMED]:
            _log.warning("%s: left out %s: %s", name, row, reason)
        if (more := len(loaded.left_out) - NAMED) > 0:
            _log.warning("%s: %d more rows are left out", name, more)
        sets.append(BenchSet(name, loaded.records, len(loaded.left_out)))
    names = [one.name for one in sets]
    if not names:
        raise ValueError("nothing to ask; name record files (--data) or benchmarks (--benchmark)")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two sets of questions are called {twice[0]!r}; write --data name=file.json")
    return sets
