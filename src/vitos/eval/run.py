"""Run a bench: every model on every benchmark, resumable at every batch, alone or in several processes.

A batch is the same however the run is cut or shared out (`plan.batches`), and each is answered by one process, so two
processes write the answers that one would have written, to the last bit. Images of the next batch are opened while
the model works on this one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from vitos import __version__
from vitos.core.record import Record
from vitos.data.images import load_image
from vitos.eval.answer import Batch, swapped_images
from vitos.eval.plan import BenchPlan, BenchSet, batches
from vitos.eval.scoring import in_protocol
from vitos.eval.selectors import SELECTORS
from vitos.eval.store import FORMAT, BenchFolder, Row, questions_fingerprint, weights_fingerprint
from vitos.policy.locate import resolve_model_path
from vitos.policy.vlm import SparseVLM


def run_bench(
    models: Mapping[str, str],
    benchmarks: Sequence[BenchSet],
    plan: BenchPlan,
    out: Path,
    load: Mapping[str, Any] | None = None,
) -> None:
    """Write the answers of all models to `out`; what is there already is not asked again.

    Args:
        models: name → folder, hub id or "nano".
        load: options of `SparseVLM.from_pretrained`, the same for all models.

    Raises:
        ValueError: if a benchmark has no question of the protocol, a model lacks what a selector needs and the plan
            insists on it, or the folder holds answers that were made otherwise.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())
    folder, sets = BenchFolder(out), [_in_protocol(benchmark, plan) for benchmark in benchmarks]
    if processes.is_main_process:
        folder.open_run(_manifest(models, sets, benchmarks, plan), {s.name: s.records for s in sets})
    processes.wait_for_everyone()
    for name, path in models.items():
        policy = SparseVLM.from_pretrained(path, device=processes.device, **(load or {}))
        own = _possible(plan, name, policy, processes)
        for benchmark in sets:
            _run_one(folder, name, policy, benchmark, own, processes)
    processes.wait_for_everyone()


def _possible(plan: BenchPlan, name: str, policy: SparseVLM, processes: PartialState) -> BenchPlan:
    """The plan with the selectors that the model can follow; says which it cannot.

    Raises:
        ValueError: for a selector that it cannot follow, if the plan insists on all.
    """
    refused = {s: refusal for s in plan.selectors if (refusal := SELECTORS[s].refusal(policy.backbone))}
    for refusal in refused.values():
        if plan.insist:
            raise ValueError(refusal)
        if processes.is_main_process:
            tqdm.write(f"{name}: left out: {refusal}")
    return replace(plan, selectors=tuple(s for s in plan.selectors if s not in refused))


def is_first_process() -> bool:
    """Whether this process is the one that writes tables."""
    return bool(PartialState(cpu=not torch.accelerator.is_available()).is_main_process)


def _run_one(
    folder: BenchFolder, model: str, policy: SparseVLM, benchmark: BenchSet, plan: BenchPlan, processes: PartialState
) -> None:
    """One model on one benchmark, this process's share."""
    process = processes.process_index
    folder.mend(model, benchmark.name, process)
    known = folder.answers(model, benchmark.name)
    # All have read what is there before anyone adds to it: the shares would differ otherwise.
    processes.wait_for_everyone()
    open_batches: list[tuple[list[Record], list[str]]] = []
    for batch in batches(benchmark.records, plan.batch_size):
        # A condition is asked again of the whole batch where a kill left some of it out.
        wanted = [c for c in plan.conditions if any(r.id not in known.get(c, {}) for r in batch)]
        if wanted:
            open_batches.append((batch, wanted))
    mine = open_batches[process :: processes.num_processes]
    total = len(benchmark.records) * len(plan.conditions)
    left = sum(len(batch) * len(wanted) for batch, wanted in open_batches)
    bar = tqdm(
        total=total,
        initial=total - left,
        unit="answer",
        desc=f"{model}, {benchmark.name}",
        dynamic_ncols=True,
        disable=not processes.is_local_main_process,
    )
    swapped = swapped_images(benchmark.records, plan)
    with bar, _Ahead() as images:
        for (batch, wanted), following in pairwise([*mine, ([], [])]):
            started, ahead = time.perf_counter(), _needed(*following, swapped)
            images.expect([*_needed(batch, wanted, swapped), *ahead])
            work = Batch(policy, batch, plan, swapped, images.open)
            for condition, rows, seconds in work.answers(wanted, known):
                folder.append("answers", model, benchmark.name, process, rows)
                folder.append("times", model, benchmark.name, process, [_time(condition, len(batch), seconds)])
                bar.update(len(rows) * processes.num_processes)  # the others are about as far
            images.forget(_needed(batch, wanted, swapped), keep=ahead)
            wall = {"wall": time.perf_counter() - started}
            spent = [_time("images", len(batch), work.vision), _time("wall", len(batch), wall)]
            folder.append("times", model, benchmark.name, process, spent)


def _time(condition: str, questions: int, seconds: Mapping[str, float]) -> Row:
    rounded = {name: round(value, 6) for name, value in seconds.items()}
    return {"condition": condition, "questions": questions, "seconds": rounded}


def _needed(batch: Sequence[Record], wanted: Sequence[str], swapped: Mapping[str, Record]) -> list[Path]:
    """Image files that a batch opens."""
    paths = [path for record in batch for path in record.image_paths]
    if "shuffled" in wanted:
        paths += [swapped[record.id].image_paths[0] for record in batch if record.id in swapped]
    return list(dict.fromkeys(paths))


def _in_protocol(benchmark: BenchSet, plan: BenchPlan) -> BenchSet:
    records = tuple(record for record in benchmark.records if in_protocol(record, plan.protocol))
    if not records:
        raise ValueError(f"{benchmark.name}: no question belongs to the protocol {plan.protocol!r}")
    return BenchSet(benchmark.name, records, benchmark.left_out)


def _manifest(
    models: Mapping[str, str], asked: Sequence[BenchSet], given: Sequence[BenchSet], plan: BenchPlan
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vitos_version": __version__,
        "settings": {
            "protocol": plan.protocol,
            "batch_size": plan.batch_size,
            "max_localization_tokens": plan.max_localization_tokens,
            "max_reasoning_tokens": plan.max_reasoning_tokens,
            "seed": plan.seed,
        },
        "models": {
            name: {"path": path, "weights": weights_fingerprint(Path(resolve_model_path(path)))}
            for name, path in models.items()
        },
        "benchmarks": {
            one.name: {
                "questions": len(one.records),
                "fingerprint": questions_fingerprint(one.records),
                "left_out": one.left_out,
                "outside_protocol": len(whole.records) - len(one.records),
            }
            for one, whole in zip(asked, given, strict=True)
        },
        "conditions": list(plan.conditions),
    }


class _Ahead:
    """Opens image files in threads before they are asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._images: dict[Path, Future[Image.Image]] = {}

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path not in self._images:
                self._images[path] = self._pool.submit(load_image, path)

    def open(self, path: Path) -> Image.Image:
        self.expect([path])
        return self._images[path].result()

    def forget(self, paths: Sequence[Path], keep: Sequence[Path]) -> None:
        for path in paths:
            if path not in keep:
                self._images.pop(path, None)


def iter_models(specs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`name=path` or a bare path, named by its last part.

    Raises:
        ValueError: if two models have the same name.
    """
    seen: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals:
            name, path = Path(spec).name, spec
        if name in seen:
            raise ValueError(f"two models are called {name!r} ({seen[name]} and {path}); write name=path")
        seen[name] = path
        yield name, path
