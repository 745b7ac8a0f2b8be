"""Run an evaluation: models × data sets × conditions, resumable at every batch, alone or in several processes.

A batch is the same however the run is cut or shared out (`conditions.batches`), and one process answers it. So two
processes write the answers that one would have written, to the last bit. The images of the next batch are opened while
the model works on this one. The folder is opened before the first question, and each answer is appended as soon as it
is there: a kill costs one condition of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from vitos.core.record import Record
from vitos.core.version import __version__
from vitos.data.images import ImageError, ImageFacts, load_image_facts
from vitos.eval.answer import Batch
from vitos.eval.conditions import ABLATIONS, EvalSet, Settings, batches, split_condition
from vitos.eval.image_ablations import swapped_paths, swaps
from vitos.eval.scoring import in_protocol
from vitos.eval.selectors import SELECTORS
from vitos.eval.store import FORMAT, EvalFolder, StoredRow, questions_fingerprint, weights_fingerprint
from vitos.policy.locate import resolve_model_path
from vitos.policy.vlm import SparseVLM
from vitos.scans.cache import EmbeddingCache


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedModel:
    """A model and the conditions that it is asked under.

    Attributes:
        name: name in the folder and the tables.
        path: folder, hub id or name of an embedded model; empty for a policy in memory.
        conditions: names of conditions, in the order in which they are run.
        load: makes the policy; called when the model's turn comes.
        insist: whether a condition that the model cannot follow is an error; otherwise it is left out.
    """

    name: str
    path: str
    conditions: tuple[str, ...]
    load: Callable[[], SparseVLM]
    insist: bool = True

    @property
    def weights(self) -> str:
        """A short name for the weights."""
        return weights_fingerprint(Path(resolve_model_path(self.path))) if self.path else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of the batches that this process answers.

    Attributes:
        index: number of this process, from 0.
        count: number of processes.
        wait: returns when all processes have called it.
        speaks: whether this process shows progress.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], object] = field(default=lambda: None)
    speaks: bool = True

    @classmethod
    def of_launcher(cls) -> Share:
        """The share of this process among those that `accelerate launch` started; everything without it."""
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(
            index=state.process_index,
            count=state.num_processes,
            wait=state.wait_for_everyone,
            speaks=state.is_local_main_process,
        )


def run_models(
    models: Sequence[AskedModel],
    sets: Sequence[EvalSet],
    settings: Settings,
    out: Path,
    *,
    cache: str | Path | None = None,
    share: Share = Share(),
) -> None:
    """Write the answers of all models to `out`; what is there already is not asked again.

    A record whose image cannot be opened, or whose text is longer than the model's context, is named, left out of
    every condition and counted (`left_out` in the folder); the next run tries it again.

    Args:
        cache: folder of an embedding cache that fits every model's encoder.
        share: this process's part.

    Raises:
        ValueError: if a data set has no question of the protocol, a model cannot follow a condition that it must, or
            the folder holds answers that were made in another way.
        OSError: if the folder cannot be written; nothing has been asked then.
    """
    folder, asked = EvalFolder(out), [_in_protocol(one, settings) for one in sets]
    if share.index == 0:
        questions = {one.name: one.records for one in asked}
        unusable = {one.name: one.left_out for one in asked}
        folder.open_run(_manifest(models, asked, sets, settings), questions, unusable)
    share.wait()
    for model in models:
        policy = model.load()
        policy = policy.with_spec(positions=settings.positions) if settings.positions else policy
        conditions = _possible(model, policy, share)
        opened = EmbeddingCache.open(cache, policy.backbone) if cache else None
        for one in asked:
            _Turn(
                folder=folder,
                model=model.name,
                policy=policy,
                asked=one,
                conditions=conditions,
                settings=settings,
                share=share,
                cache=opened,
            ).run()
    share.wait()


def _possible(model: AskedModel, policy: SparseVLM, share: Share) -> tuple[str, ...]:
    """The conditions that the model can follow; the others are printed.

    Raises:
        ValueError: for a condition that it cannot follow, if it must follow all.
    """
    selectors = dict.fromkeys(split_condition(name)[0] for name in model.conditions)
    refusals = {s: why for s in selectors if s in SELECTORS and (why := SELECTORS[s].refusal(policy.backbone))}
    for why in refusals.values():
        if model.insist:
            raise ValueError(why)
        if share.speaks:
            tqdm.write(f"{model.name}: left out: {why}")
    return tuple(name for name in model.conditions if split_condition(name)[0] not in refusals)


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One model on one data set."""

    folder: EvalFolder
    model: str
    policy: SparseVLM
    asked: EvalSet
    conditions: tuple[str, ...]
    settings: Settings
    share: Share
    cache: EmbeddingCache | None

    def run(self) -> None:
        """Answer this process's share of the batches."""
        share, records = self.share, self.asked.records
        self.folder.mend(self.model, self.asked.name, share.index)
        known = self.folder.answers(self.model, self.asked.name)
        # All have read what is there before anyone adds to it: the shares would differ otherwise.
        share.wait()
        open_batches: list[tuple[list[Record], list[str]]] = []
        for batch in batches(records, self.settings.batch_size):
            # A condition is asked again of the whole batch where a kill left some of it out.
            wanted = [c for c in self.conditions if any(r.id not in known.get(c, {}) for r in batch)]
            if wanted:
                open_batches.append((batch, wanted))
        mine = open_batches[share.index :: share.count]
        total = len(records) * len(self.conditions)
        left = sum(len(batch) * len(wanted) for batch, wanted in open_batches)
        name = f"{self.model}, {Path(self.asked.name).name}"[:30]  # the rest of the line wants 50 columns
        bar = tqdm(
            total=total, initial=total - left, unit="answer", desc=name, dynamic_ncols=True, disable=not share.speaks
        )
        swapped = swaps(records, self.settings.seed) if ABLATIONS.keys() & set(self.conditions) else {}
        with bar, _Ahead() as images:
            for (batch, wanted), following in pairwise([*mine, ([], [])]):
                now, later = _needed(batch, wanted, swapped), _needed(*following, swapped)
                images.expect([*now, *later])
                for done in self._answer(batch, wanted, known, swapped, images):
                    bar.update(done)
                images.forget([path for path in now if path not in later])

    def _answer(
        self,
        batch: Sequence[Record],
        wanted: Sequence[str],
        known: Mapping[str, Mapping[str, StoredRow]],
        swapped: Mapping[str, Record],
        images: _Ahead,
    ) -> Iterator[int]:
        """Ask one batch and append the answers condition by condition; yields their number, in all processes."""
        started, asked = time.perf_counter(), list(batch)
        for record in batch:
            if problem := images.problem(record.image_paths) or self._length_problem(record):
                asked.remove(record)
                self._append("left_out", [{"id": record.id, "reason": problem}])
                tqdm.write(f"{self.asked.name}: left out {record.id}: {problem}")
        if not asked or all(r.id in known.get(c, {}) for c in wanted for r in asked):
            yield len(batch) * len(wanted)
            return
        work = Batch(
            policy=self.policy,
            records=asked,
            settings=self.settings,
            swapped=swapped,
            open_image=images.open,
            cached=self.cache.get if self.cache is not None else None,
        )
        self._append("images", work.images)
        for condition, rows, seconds in work.answers(wanted, known):
            self._append("answers", rows)
            self._append("times", [_time(condition, len(asked), seconds)])
            yield len(batch) * self.share.count if condition in wanted else 0  # the others are about as far
        wall = {"wall": time.perf_counter() - started}
        self._append("times", [_time("images", len(asked), work.vision), _time("wall", len(asked), wall)])

    def _length_problem(self, record: Record) -> str:
        """Why a question is too long for the model; empty if it is not."""
        longest = max(self.settings.max_localization_tokens, self.settings.max_reasoning_tokens)
        return self.policy.branches.length_problem(record.question, record.kind, longest)

    def _append(self, kind: str, rows: Sequence[StoredRow]) -> None:
        self.folder.append(kind, self.model, self.asked.name, self.share.index, rows)


def _time(condition: str, questions: int, seconds: Mapping[str, float]) -> StoredRow:
    rounded = {name: round(value, 6) for name, value in seconds.items()}
    return {"condition": condition, "questions": questions, "seconds": rounded}


def _needed(batch: Sequence[Record], wanted: Sequence[str], swapped: Mapping[str, Record]) -> list[Path]:
    """Image files that a batch opens."""
    paths = [path for record in batch for path in record.image_paths]
    if "shuffled" in wanted:
        paths += [path for r in batch if r.id in swapped for path in swapped_paths(r, swapped[r.id])]
    return list(dict.fromkeys(paths))


def _in_protocol(one: EvalSet, settings: Settings) -> EvalSet:
    protocol = settings.protocol
    records = tuple(record for record in one.records if protocol is None or in_protocol(record, protocol))
    if not records:
        wanted = f" of the protocol {protocol!r}" if protocol else ""
        raise ValueError(f"{one.name}: there is no question{wanted}; check the file and its limit")
    return replace(one, records=records)


def _manifest(
    models: Sequence[AskedModel], asked: Sequence[EvalSet], given: Sequence[EvalSet], settings: Settings
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vitos_version": __version__,
        "settings": settings.told(),
        "models": {model.name: {"path": model.path, "weights": model.weights} for model in models},
        "benchmarks": {
            one.name: {
                "questions": len(one.records),
                "fingerprint": questions_fingerprint(one.records),
                "left_out": len(one.left_out),
                "outside_protocol": len(whole.records) - len(one.records),
            }
            for one, whole in zip(asked, given, strict=True)
        },
        "conditions": list(dict.fromkeys(name for model in models for name in model.conditions)),
    }


class _Ahead:
    """Opens image files in threads before they are asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._images: dict[Path, Future[tuple[Image.Image, ImageFacts]]] = {}

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path not in self._images:
                self._images[path] = self._pool.submit(load_image_facts, path)

    def open(self, path: Path) -> tuple[Image.Image, ImageFacts]:
        self.expect([path])
        return self._images[path].result()

    def problem(self, paths: Sequence[Path]) -> str:
        """Why one of the images cannot be opened; empty if all can."""
        for path in paths:
            try:
                self.open(path)
            except ImageError as error:
                return str(error)
        return ""

    def forget(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._images.pop(path, None)


def named_models(specs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and path of each model, from `name=path` or a bare path, which is named by its last part.

    Example:
        >>> dict(named_models(["before=nano", "runs/quickstart/model"]))
        {'before': 'nano', 'model': 'runs/quickstart/model'}

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
