"""The answers to one batch of questions, condition by condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitos.core.geometry import BoolArray, Box, TokenGrid, cut, into_crop
from vitos.core.prompt import VisualTokens
from vitos.core.record import Record
from vitos.core.sparsify import Kept, select
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import ImageError, ImageFacts
from vitos.engines.base import Sampling
from vitos.eval.conditions import ABLATIONS, CONTROL, DENSE, LOCALIZE, OWN, OWN_BOXES, Settings, split_condition
from vitos.eval.controls import control_masks
from vitos.eval.image_ablations import blank, painted, swapped_paths
from vitos.eval.selectors import SELECTORS, Choice, Task
from vitos.eval.store import StoredRow
from vitos.policy.plans import Limits, Outcome
from vitos.policy.run import answer
from vitos.policy.types import Query, Rollout, Scan
from vitos.policy.vlm import SparseVLM

OpenImage = Callable[[Path], tuple[Image.Image, ImageFacts]]
Answered = tuple[str, list[StoredRow], dict[str, float]]
Masks = Mapping[str, Mapping[str, BoolArray | None]]
"""Question id → control → keep mask, or None where the control is not defined."""


@dataclass(kw_only=True)
class Batch:
    """Questions that a policy answers together; each distinct image is opened and encoded once.

    Attributes:
        policy: the model; it answers by its plan wherever the plan can be told which tokens to keep.
        records: the questions.
        settings: longest responses and the seed.
        swapped: question id → record whose image is shown instead in the condition `shuffled`.
        open_image: opens an image file, RGB, and says how.
        cached: gives the visual tokens of a picture from a cache; None: pictures are encoded.
    """

    policy: SparseVLM
    records: Sequence[Record]
    settings: Settings
    swapped: Mapping[str, Record]
    open_image: OpenImage
    cached: Callable[[Image.Image, Path], VisualTokens] | None = None

    def answers(self, wanted: Sequence[str], known: Mapping[str, Mapping[str, StoredRow]]) -> Iterator[Answered]:
        """Rows and seconds of every wanted condition.

        Args:
            wanted: names of conditions, in the order in which they are answered.
            known: stored rows by condition and id; boxes and own tokens are taken from them.
        """
        own = {name: dict(known.get(name, {})) for name in (LOCALIZE, OWN_BOXES)}
        first = [name for name in own if name in wanted]
        if first:
            for name, rows, seconds in self._own() if OWN_BOXES in wanted else [self._localize()]:
                own[name] = {row["id"]: row for row in rows}
                yield name, rows, seconds
        tasks = self._tasks(own[LOCALIZE])
        masks = self._controls([name for name in wanted if name.startswith(CONTROL)], tasks, own[OWN_BOXES])
        for condition in wanted:
            if condition not in first:
                yield condition, *self._reason(condition, tasks, masks)

    @cached_property
    def vision(self) -> dict[str, float]:
        """Seconds of opening and encoding the images (`open`, `vision`, `prefix`)."""
        return self._encoded[1]

    @cached_property
    def images(self) -> list[StoredRow]:
        """How each question's images were opened, and the grids of their visual tokens."""
        rows = []
        for record in self.records:
            scan = self._encoded[0][record.image_paths]
            first, *others = [
                {"image": str(path), **_laid_out(visual.grid)}
                for path, visual in zip(record.image_paths, scan.visuals, strict=True)
            ]
            row = {"id": record.id, "images": [facts.to_json() for facts in scan.images], **first}
            rows.append(row | ({"others": others} if others else {}))
        return rows

    # --- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def _encoded(self) -> tuple[dict[tuple[Path, ...], Scan], dict[str, float]]:
        """Whole images by path, and seconds; they hold pictures only if the plan needs them."""
        watch, branches, plan, cached = Stopwatch(), self.policy.branches, self.policy.plan, self.cached
        with watch.span("open"):
            groups = dict.fromkeys(record.image_paths for record in self.records)
            opened = {paths: [self.open_image(path) for path in paths] for paths in groups}
        scans = {}
        with watch.span("vision"):
            for paths, loaded in opened.items():
                pictures = tuple(picture for picture, _ in loaded)
                visuals = branches.encode(pictures) if cached is None else tuple(map(cached, pictures, paths))
                scan = Scan(visuals, pictures=pictures if plan.needs_pictures else ())
                scans[paths] = scan.of_files([facts for _, facts in loaded])
        if plan.shares_prefix:  # the dense condition and the controls share it with the plan
            queries = {record.image_paths: _query(record, scans) for record in self.records}
            shared = self.policy.with_prefixes(list(queries.values()), watch)
            scans = {paths: query.scan for paths, query in zip(queries, shared, strict=True)}
        return scans, watch.seconds

    def _queries(self) -> list[Query]:
        return [_query(record, self._encoded[0]) for record in self.records]

    def _planned(self, watch: Stopwatch) -> list[Query]:
        """The questions about images as the plan begins with them."""
        queries, plan = self._queries(), self.policy.plan
        if not plan.reduced:
            return queries
        with watch.span("vision"):
            scans = {query.scan: plan.scan(self.policy.branches, query.scan.pictures) for query in queries}
        return [replace(query, scan=scans[query.scan].of_files(query.scan.images)) for query in queries]

    def _tasks(self, localized: Mapping[str, StoredRow]) -> list[Task]:
        shared: dict[tuple[Path, ...], dict[str, Any]] = {}
        return [
            Task(
                self.policy,
                query,
                record,
                boxes=[Box.from_json(b) for b in localized[record.id]["boxes"]] if record.id in localized else (),
                seed=self.settings.seed,
                image=partial(self._picture, record.image_paths[0]),
                others=[partial(self._picture, path) for path in record.image_paths[1:]],
                shared=shared.setdefault(record.image_paths, {}),
            )
            for record, query in zip(self.records, self._queries(), strict=True)
        ]

    def _picture(self, path: Path) -> Image.Image:
        return self.open_image(path)[0]

    # --- the policy's own boxes -------------------------------------------------------------------------------------

    def _own(self) -> list[Answered]:
        """Both branches by the policy's plan."""
        watch, policy, settings = Stopwatch(), self.policy, self.settings
        limits = Limits(max_tokens=settings.max_reasoning_tokens, max_evidence_tokens=settings.max_localization_tokens)
        queries = self._planned(watch)
        outcomes = answer(policy.plan, policy.branches, policy.engine, queries, limits, watch)
        located, reasoned = [], []
        for record, outcome in zip(self.records, outcomes, strict=True):
            located.append(_localized(record, outcome))
            reasoned.append(_row(record, OWN_BOXES, outcome.reasoning, outcome.kept))
        first = {name: value for name, value in watch.seconds.items() if name.startswith("localize")}
        second = {name: value for name, value in watch.seconds.items() if name not in first}
        return [(LOCALIZE, located, first), (OWN_BOXES, reasoned, second)]

    def _localize(self) -> Answered:
        """The localization branch alone."""
        watch = Stopwatch()
        queries = self._planned(watch)
        found = self.policy.localize(queries, Sampling(self.settings.max_localization_tokens), watch=watch)
        rows = [_written(record, rollout) for record, (rollout,) in zip(self.records, found, strict=True)]
        return LOCALIZE, rows, watch.seconds

    # --- other tokens -----------------------------------------------------------------------------------------------

    def _reason(self, condition: str, tasks: Sequence[Task], masks: Masks) -> tuple[list[StoredRow], dict[str, float]]:
        watch = Stopwatch()
        asked: Sequence[tuple[Task | None, str]] = [(task, "") for task in tasks]
        if condition in ABLATIONS:
            asked = self._changed(condition, tasks, watch)
        with watch.span("sparsify"):
            choices = [_choose(task, condition, masks) if task else None for task, _ in asked]
            chosen = [(t, c) for (t, _), c in zip(asked, choices, strict=True) if t and c]
            prompts = [task.prompt_of(choice) for task, choice in chosen]
        sampling, queries = Sampling(self.settings.max_reasoning_tokens), [task.query for task, _ in chosen]
        rollouts = iter(self.policy.reason(queries, prompts, sampling, watch=watch) if chosen else ())
        rows: list[StoredRow] = []
        for record, (task, shown), choice in zip(self.records, asked, choices, strict=True):
            if task is None or choice is None:  # not defined for this question
                rows.append({"id": record.id, "condition": condition, "text": None})
                continue
            (rollout,) = next(rollouts)
            kept = Kept(task.grid if choice.visual is None else choice.visual.grid, choice.mask)
            row = _row(record, condition, rollout, kept) | {"total": task.grid.num_tokens}
            if kept.grid != task.grid:
                del row["tokens"]
            row |= {"fallback": True} if choice.fallback else {}
            rows.append(row | ({"shown": shown} if shown else {}))
        return rows, watch.seconds

    def _controls(self, conditions: Sequence[str], tasks: Sequence[Task], own: Mapping[str, StoredRow]) -> Masks:
        if not conditions:
            return {}
        names = [name.removeprefix(CONTROL) for name in conditions]
        budgets = [float(budget) for budget in dict.fromkeys(n.partition("@")[2] for n in names) if budget]
        return {
            task.record.id: control_masks(
                Kept(task.grid, unpacked(own[task.record.id])),
                task.record,
                task.boxes,
                budgets,
                controls=any("@" not in name for name in names),
                seed=self.settings.seed,
                keep=self.policy.spec.keep,
            )
            for task in tasks
        }

    # --- changed images ---------------------------------------------------------------------------------------------

    def _changed(self, condition: str, tasks: Sequence[Task], watch: Stopwatch) -> list[tuple[Task | None, str]]:
        """The tasks with other pictures in place of their images, and what these are; None where undefined."""
        made: dict[Any, Scan] = {}
        out: list[tuple[Task | None, str]] = []
        for task in tasks:
            change = self._change(condition, task)
            if change is None:
                out.append((None, ""))
                continue
            shown, key, pictures = change
            if key not in made:
                try:
                    with watch.span("open"):
                        opened = pictures()
                except ImageError:  # another question's image, which is left out and named there
                    out.append((None, ""))
                    continue
                with watch.span("vision"):
                    made[key] = Scan(self.policy.branches.encode(opened))
            query = replace(task.query, scan=made[key])
            changed = Task(self.policy, query, task.record, boxes=task.boxes, image=task.image, others=task.others)
            out.append((changed, shown))
        return out

    def _change(self, condition: str, task: Task) -> tuple[str, Any, Callable[[], list[Image.Image]]] | None:
        """What is shown, a key for the pictures, and the pictures; None if the condition is not defined for a task."""
        record, images = task.record, (task.image, *task.others)
        if condition == "blank":
            return "blank", record.image_paths, lambda: [blank(open_image()) for open_image in images]
        if condition == "shuffled":
            other = self.swapped.get(record.id)
            if other is None:
                return None
            paths = swapped_paths(record, other)
            return other.id, (record.image_paths, paths), lambda: [self._picture(path) for path in paths]
        given = task.grid.by_image(record.boxes or task.boxes)
        boxes = tuple(tuple(into_crop(b, grid.shown) for b in own if cut(b, grid.shown)) for grid, own in given)
        inside = condition == "evidence_hidden"
        shown = "gold boxes" if record.boxes else "own boxes"

        def paint() -> list[Image.Image]:
            return [painted(see(), own, inside=inside) for see, own in zip(images, boxes, strict=True)]

        return (shown, (record.image_paths, boxes), paint) if any(boxes) else None


def _laid_out(grid: TokenGrid) -> StoredRow:
    """The places of one image's visual tokens, as they are stored."""
    views = [{"rect": list(v.rect.as_tuple()), "rows": v.rows, "cols": v.cols} for v in grid.views]
    return {"grid": views, "shown": list(grid.shown.as_tuple())}


def unpacked(row: StoredRow) -> BoolArray:
    """The keep mask of a stored answer, bool (total,)."""
    bits = np.frombuffer(bytes.fromhex(row["tokens"]), dtype=np.uint8)
    return np.unpackbits(bits)[: row["total"]].astype(bool)


def _query(record: Record, scans: Mapping[tuple[Path, ...], Scan]) -> Query:
    return Query(scans[record.image_paths], record.question, record.kind)


def _choose(task: Task, condition: str, masks: Masks) -> Choice | None:
    """The tokens of a condition; None if it is not defined for the question, or the budget cannot be met."""
    total = task.grid.num_tokens
    selector, budget = split_condition(condition)
    if condition == DENSE or condition in ABLATIONS:
        return Choice(np.ones(total, dtype=bool))
    if condition.startswith(CONTROL):
        mask = masks[task.record.id][condition.removeprefix(CONTROL)]
        return None if mask is None else Choice(mask)
    if budget != OWN:
        return SELECTORS[selector].choose(task, max(1, round(float(budget) * total)))
    own = select(task.grid, task.boxes, task.policy.spec.keep)
    if own.fallback:
        return Choice(own.mask, fallback=True)
    return SELECTORS[selector].choose(task, own.count)


def _localized(record: Record, outcome: Outcome) -> StoredRow:
    """The evidence of a plan; without a text if the plan found it without writing (`one_pass`)."""
    if outcome.localization is not None:
        return _written(record, outcome.localization)
    boxes = [box.to_json() for box in outcome.boxes]
    return {"id": record.id, "condition": LOCALIZE, "text": None, "boxes": boxes, "parsed": True}


def _written(record: Record, rollout: Rollout) -> StoredRow:
    boxes = [box.to_json() for box in rollout.response.boxes]
    parsed = rollout.response.evidence_parsed
    return {"id": record.id, "condition": LOCALIZE, "text": rollout.completion.text, "boxes": boxes, "parsed": parsed}


def _row(record: Record, condition: str, rollout: Rollout, kept: Kept) -> StoredRow:
    row: StoredRow = {
        "id": record.id,
        "condition": condition,
        "text": rollout.completion.text,
        "kept": kept.count,
        "total": kept.grid.num_tokens,
        "tokens": np.packbits(kept.mask).tobytes().hex(),
    }
    return row | ({"fallback": True} if kept.fallback else {})
