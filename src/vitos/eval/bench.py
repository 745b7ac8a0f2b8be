"""`vitos bench run` and `rescore`: models × data sets × token selectors × budgets, as one run of the evaluator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vitos.data.readers import read_records
from vitos.eval.conditions import ABLATIONS, DENSE, OWN, EvalSet, Settings
from vitos.eval.evaluate import RESULTS, score
from vitos.eval.figures import ALL, figures
from vitos.eval.run import AskedModel, Share, run_models
from vitos.eval.selectors import SELECTORS
from vitos.eval.sources import open_benchmark
from vitos.eval.store import MANIFEST, EvalFolder
from vitos.policy.vlm import SparseVLM
from vitos.reports.bench import BenchNames, write_bench


def run_bench(
    models: Mapping[str, str],
    sets: Sequence[EvalSet],
    conditions: Sequence[str],
    settings: Settings,
    out: Path,
    *,
    insist: bool = True,
    load: Mapping[str, Any] | None = None,
) -> None:
    """Write the answers of all models to `out`, in as many processes as `accelerate launch` started.

    Args:
        models: name → folder, hub id or name of an embedded model.
        sets: data sets.
        conditions: names of conditions, see `bench_conditions`.
        settings: protocol, longest responses, batch size and seed.
        out: folder of the run.
        insist: whether a model that lacks what a condition needs is an error; otherwise the condition is left out.
        load: options of `SparseVLM.from_pretrained`, the same for all models.

    Raises:
        ValueError, OSError: as `run_models`.
    """
    asked = [
        AskedModel(
            name=name,
            path=path,
            conditions=tuple(conditions),
            load=partial(SparseVLM.from_pretrained, path, **(load or {})),
            insist=insist,
        )
        for name, path in models.items()
    ]
    run_models(asked, sets, settings, out, share=Share.of_launcher())


def rescore(out: Path, base: str | None = None, bootstrap_samples: int = 10_000) -> dict[str, Any]:
    """Make all figures and tables of a bench or an evaluation again from its stored answers, without a model.

    Args:
        out: folder of a `vitos bench run` or a `vitos eval`.
        base: model of a bench that accuracies are related to; None: each model itself.
        bootstrap_samples: number of resamples per interval of a bench.

    Raises:
        ValueError: if `out` holds neither, a line in it is damaged, or there is no model `base`.
    """
    if not (out / MANIFEST).is_file() and (out / RESULTS).is_file():
        answers = json.loads((out / RESULTS).read_text(encoding="utf-8")).get("answers")
        if answers and (out / answers / MANIFEST).is_file():
            return score(out / answers, out)
    results = figures(EvalFolder(out), base=base, bootstrap_samples=bootstrap_samples)
    titles = {name: selector.title for name, selector in SELECTORS.items()}
    write_bench(out, results, BenchNames(selectors=titles, ablations=ABLATIONS, dense=DENSE, own=OWN, average=ALL))
    return results


def read_sets(data: Sequence[str], benchmarks: Sequence[str], limit: int | None = None) -> list[EvalSet]:
    """Record files and benchmarks by name.

    Args:
        data: record files as `file.json` or `name=file.json`; without a name the file's own is used.
        benchmarks: benchmarks as `name`, `name@split`, `name=folder` or `name=hub:owner/set`, with or
            without `benchmark:`.
        limit: number of rows per set, from its start; None: all.

    Raises:
        ValueError: if two have the same name, or none is given.
        DataError: if one cannot be read.
    """
    sets = []
    for spec in data:
        name, equals, source = spec.partition("=")
        source = source if equals else spec
        records = tuple(read_records(source, limit=limit))
        sets.append(EvalSet(name if equals else Path(source).stem, records))
    for spec in benchmarks:
        loaded = open_benchmark(spec, limit)
        sets.append(EvalSet(loaded.name, loaded.records, loaded.left_out))
    names = [one.name for one in sets]
    if not names:
        raise ValueError("nothing to ask; name record files (--data) or benchmarks (--benchmark)")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two sets of questions are called {twice[0]!r}; write --data name=file.json")
    return sets
