"""The answers of one batch of questions, condition by condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.core.sparsify import select
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.eval.image_ablations import blank, painted, swaps
from vitos.eval.plan import DENSE, LOCALIZE, LOOKS, OWN, BenchPlan, split_condition
from vitos.eval.selectors import SELECTORS, Choice, Task
from vitos.eval.store import Row
from vitos.policy.types import Query, Scan
from vitos.policy.vlm import SparseVLM

OpenImage = Callable[[Path], Image.Image]
Answered = tuple[str, list[Row], dict[str, float]]


@dataclass
class Batch:
    """Questions of one batch with a policy; each distinct image is opened and encoded once.

    Attributes:
        swapped: for the shuffled look, the record whose image is shown instead, by question id.
        open_image: opens an image file, RGB.
    """

    policy: SparseVLM
    records: Sequence[Record]
    plan: BenchPlan
    swapped: Mapping[str, Record]
    open_image: OpenImage

    def answers(self, wanted: Sequence[str], known: Mapping[str, Mapping[str, Row]]) -> Iterator[Answered]:
        """Rows and seconds of every wanted condition.

        Args:
            wanted: conditions, `localize` first where it is among them.
            known: rows that are there already, by condition and id; the localization's boxes are taken from them.
        """
        localized = known.get(LOCALIZE, {})
        if LOCALIZE in wanted:
            rows, seconds = self._localize()
            localized = {row["id"]: row for row in rows}
            yield LOCALIZE, rows, seconds
        boxes = {name: [Box(*box) for box in row["boxes"]] for name, row in localized.items()}
        tasks = self._tasks(boxes)
        for condition in wanted:
            if condition != LOCALIZE:
                yield condition, *self._reason(condition, tasks)

    @cached_property
    def vision(self) -> dict[str, float]:
        """Seconds of opening and encoding the images (`open`, `vision`)."""
        return self._encoded[1]

    # --- the moves --------------------------------------------------------------------------------------------------

    @cached_property
    def _encoded(self) -> tuple[dict[tuple[Path, ...], Scan], dict[str, float]]:
        watch = Stopwatch()
        paths = list(dict.fromkeys(record.image_paths for record in self.records))
        with watch.span("open"):
            pictures = [[self.open_image(path) for path in group] for group in paths]
        with watch.span("vision"):
            scans = self.policy.branches.encode_many(pictures)
        return dict(zip(paths, scans, strict=True)), watch.seconds

    def _query(self, record: Record) -> Query:
        return Query(self._encoded[0][record.image_paths], record.question, record.kind)

    def _tasks(self, boxes: Mapping[str, Sequence[Box]]) -> list[Task]:
        shared: dict[tuple[Path, ...], dict[str, Any]] = {}

        def opener(path: Path) -> Callable[[], Image.Image]:
            return lambda: self.open_image(path)

        return [
            Task(
                self.policy,
                self._query(record),
                record,
                boxes=boxes.get(record.id, ()),
                seed=self.plan.seed,
                image=opener(record.image_paths[0]),
                shared=shared.setdefault(record.image_paths, {}),
            )
            for record in self.records
        ]

    def _localize(self) -> tuple[list[Row], dict[str, float]]:
        queries, watch = [self._query(record) for record in self.records], Stopwatch()
        with watch.span("select"):
            prompts = [self.policy.branches.localize_prompt(query) for query in queries]
        sampling = Sampling(self.plan.max_localization_tokens)
        found = self.policy.localize(queries, sampling, watch=watch, prompts=prompts)
        rows = []
        for record, (rollout,) in zip(self.records, found, strict=True):
            boxes = [list(box.as_tuple()) for box in rollout.response.boxes]
            rows.append({"id": record.id, "condition": LOCALIZE, "text": rollout.completion.text, "boxes": boxes})
        return rows, _stages(watch)

    def _reason(self, condition: str, tasks: Sequence[Task]) -> tuple[list[Row], dict[str, float]]:
        watch = Stopwatch()
        asked: Sequence[tuple[Task | None, str]] = [(task, "") for task in tasks]
        if condition in LOOKS:
            asked = self._looking(condition, tasks, watch)
        with watch.span("select"):
            choices = [_choose(task, condition) if task else None for task, _ in asked]
            chosen = [(t, c) for (t, _), c in zip(asked, choices, strict=True) if t and c]
            prompts = [task.sparse_prompt(choice) for task, choice in chosen]
        sampling = Sampling(self.plan.max_reasoning_tokens)
        queries = [task.query for task, _ in chosen]
        rollouts = iter(self.policy.reason(queries, prompts, sampling, watch=watch) if chosen else ())
        rows: list[Row] = []
        for record, (task, shown), choice in zip(self.records, asked, choices, strict=True):
            row: Row = {"id": record.id, "condition": condition}
            if task is None or choice is None:  # not defined for this question
                rows.append(row | {"text": None})
                continue
            (rollout,) = next(rollouts)
            row |= {"text": rollout.completion.text, "kept": choice.count, "total": task.grid.num_tokens}
            if choice.visual is None or choice.visual.grid == task.grid:
                row["tokens"] = np.packbits(choice.mask).tobytes().hex()
            if choice.fallback:
                row["fallback"] = True
            if shown:
                row["shown"] = shown
            rows.append(row)
        return rows, _stages(watch)

    def _looking(self, condition: str, tasks: Sequence[Task], watch: Stopwatch) -> list[tuple[Task | None, str]]:
        """The tasks with other pictures in the place of their first image, and what is shown; None where undefined."""
        made: dict[Any, Scan] = {}
        out: list[tuple[Task | None, str]] = []
        for task in tasks:
            record = task.record
            look = self._look(condition, task)
            if look is None:
                out.append((None, ""))
                continue
            shown, key = look
            if key not in made:
                with watch.span("open"):
                    picture = self._picture(condition, record, key)
                with watch.span("vision"):
                    (first,) = self.policy.branches.encode([picture])
                made[key] = Scan((first, *task.query.scan.visuals[1:]))
            query = replace(task.query, scan=made[key])
            out.append((Task(self.policy, query, record, boxes=task.boxes, image=task.image), shown))
        return out

    def _look(self, condition: str, task: Task) -> tuple[str, Any] | None:
        """What is shown, and what tells it from other pictures; None if the look is not defined for the question."""
        record = task.record
        if condition == "blank":
            return "blank", record.image_paths
        if condition == "shuffled":
            other = self.swapped.get(record.id)
            return (other.id, (record.image_paths, other.image_paths[0])) if other else None
        boxes = tuple(record.boxes or task.boxes)
        return ("gold boxes" if record.boxes else "own boxes", (record.image_paths, boxes)) if boxes else None

    def _picture(self, condition: str, record: Record, key: Any) -> Image.Image:
        if condition == "shuffled":
            return self.open_image(key[1])
        own = self.open_image(record.image_paths[0])
        return blank(own) if condition == "blank" else painted(own, key[1], inside=condition == "evidence_hidden")


def swapped_images(records: Sequence[Record], plan: BenchPlan) -> dict[str, Record]:
    """For `Batch.swapped`, over all questions of a benchmark."""
    return swaps(records, plan.seed) if plan.looks else {}


def _choose(task: Task, condition: str) -> Choice | None:
    """The tokens of a condition."""
    total = task.grid.num_tokens
    selector, budget = split_condition(condition)
    if condition == DENSE or selector in LOOKS:
        return Choice(np.ones(total, dtype=bool))
    if budget != OWN:
        return SELECTORS[selector].choose(task, max(1, round(float(budget) * total)))
    own = select(task.grid, task.boxes, task.policy.spec.keep)
    if selector == "policy" or own.fallback:
        return Choice(own.mask, fallback=own.fallback)
    return SELECTORS[selector].choose(task, int(own.mask.sum()))


def _stages(watch: Stopwatch) -> dict[str, float]:
    """Seconds under the names of a bench: open, vision, select, prefill, decode."""
    seconds: dict[str, float] = {}
    for name, value in watch.seconds.items():
        stage = name.removeprefix("localize_").removeprefix("reason_")
        seconds[stage] = seconds.get(stage, 0.0) + value
    return seconds
