"""Distillation of the evidence head: it learns to find, inside the first pass, the cells that boxes would keep.

    records ─► localize ─► own boxes ─► cells ─┐
                                               ├─► binary cross-entropy ─► head (the model stays as it is)
    records ─► layers 1..k ─► states ─► scores ┘      (of whole images, reduced ones, or both: by the plan)

The teacher is the policy's own localization branch, so no gold boxes are needed; gold boxes can be used instead, or
both. Part of the images is never trained on: on them the training is stopped, and the head is reported on.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitos.backbones.evidence_head import HEADS, EvidenceHead, HeadKind
from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.record import Record
from vitos.core.sparsify import best_cells, select
from vitos.engines.base import Sampling
from vitos.engines.in_flight import run_early
from vitos.policy.plans import get_plan
from vitos.policy.spec import HeadRule
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.scans.store import ScanStore

Teacher = Literal["own", "gold", "both"]
Item = TypeVar("Item")
SHARES = (0.05, 0.1, 0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """How an evidence head is trained.

    Attributes:
        layers: number of layers before the head; None for a quarter of the model's, at least 1.
        teacher: boxes to learn from: the policy's own, gold ones, or the mean of both.
        kind: "pointer" (ours), or "glimpse", a rival (`backbones/evidence_head.py`).
        plans: names of the plans that the head is for; with several it learns from the images of each.
        keep: share of the visual tokens to keep, at which the training is judged and which the checkpoint then keeps.
        size: size of the space in which the head compares question and tokens.
        steps: largest number of updates.
        batch_size: questions per update.
        learning_rate: peak of AdamW's cosine schedule.
        evidence_weight: weight of a cell of evidence in the loss; the other cells have weight 1.
        validation: share of the images that is not trained on.
        every: number of updates between two looks at the validation images.
        patience: number of looks without a lower loss after which the training stops.
        max_tokens: longest localization of the teacher.
        seed: seed of weights, order and split.
        memory: largest size of states that are kept instead of being computed again, in bytes.

    Raises:
        ValueError: for a value out of its range.
    """

    layers: int | None = None
    teacher: Teacher = "own"
    kind: HeadKind = "pointer"
    plans: tuple[str, ...] = ("one_pass",)
    keep: float = 0.25
    size: int = 64
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3
    evidence_weight: float = 3.0
    validation: float = 0.1
    every: int = 50
    patience: int = 6
    max_tokens: int = 256
    seed: int = 0
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        counts = (self.size, self.steps, self.batch_size, self.every, self.patience, self.max_tokens)
        if min(counts) < 1 or not 0 < self.validation < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"counts must be at least 1, validation in (0, 1) and keep in (0, 1], got {self}")
        for name, known in (("teacher", get_args(Teacher)), ("kind", tuple(HEADS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if wrong := [name for name in self.plans if get_plan(name).localizes or not get_plan(name).drops]:
            raise ValueError(f"plan {wrong[0]} does not choose by an evidence head; take one_pass, glance or both")
        if not self.plans:
            raise ValueError("plans must name at least one plan")


@dataclass(frozen=True, slots=True)
class HeadLesson:
    """One question and the cells of its evidence.

    Attributes:
        record: the question.
        target: probability of evidence of each visual token, image by image, float32, (N,).
        plan: name of the plan whose images the tokens are of.
    """

    record: Record
    target: Tensor
    plan: str = "one_pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """What a distilled head finds on the images that it was not trained on.

    Attributes:
        options: the options of the training.
        layers: number of layers before the head.
        trained, validated: number of questions; each is learned once for each plan.
        left_out: questions without a box of the teacher.
        updates: number of updates of the weights that were kept.
        losses: (update, training loss, validation loss) at each look.
        recall: template → share of the cells of evidence that is found when a share of the visual tokens is kept, by
            that share; "all" for all questions. A random choice finds the share that it keeps. Of several plans, each
            has rows of its own, whose names begin with the plan's.
    """

    options: DistillOptions
    layers: int
    trained: int
    validated: int
    left_out: int
    updates: int
    losses: list[tuple[int, float, float]]
    recall: dict[str, dict[float, float]]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def distill(
    policy: SparseVLM,
    records: Sequence[Record],
    options: DistillOptions = DistillOptions(),
    progress: Callable[[str], object] = lambda _: None,
) -> DistillReport:
    """Train an evidence head for a policy, which gets the head and a spec that uses it; its weights do not change.

    Args:
        policy: the policy; also the teacher.
        records: questions; gold boxes are needed only by teachers that use them.
        options: options of the training.
        progress: called with a sentence on what is done.

    Raises:
        ValueError: if no question is left to train or validate on, or `layers` is more than the model has.
    """
    depth = len(policy.backbone.language_model.layers)
    layers = max(1, depth // 4) if options.layers is None else options.layers
    hidden = int(policy.backbone.model.config.get_text_config().hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = HEADS[options.kind](hidden, options.size).to(policy.backbone.device)
    stores = head_stores(policy, head, options.plans)
    progress(f"{options.teacher} boxes of {len(records)} questions")
    lessons = head_lessons(policy, records, stores, options)
    states = HeadStates(policy, stores, layers, options.memory)
    training, held_out = split_by_image(lessons, options.validation, options.seed)
    if not training or not held_out:
        raise ValueError(
            f"{_questions(lessons)} of {len(records)} questions have boxes, too few to train and validate on; give "
            "more data, or another teacher"
        )
    updates, losses = fit_head(head, training, held_out, states, options, progress)
    head.plans = options.plans
    policy.backbone.evidence_head = head.requires_grad_(False)
    policy.spec = policy.with_spec(evidence_head=HeadRule(after=layers, keep=options.keep, kind=options.kind)).spec
    return DistillReport(
        options=options,
        layers=layers,
        trained=_questions(training),
        validated=_questions(held_out),
        left_out=len(records) - _questions(lessons),
        updates=updates,
        losses=losses,
        recall=recall_by_template(head, held_out, states),
    )


def _questions(lessons: Sequence[HeadLesson]) -> int:
    return len({lesson.record.id for lesson in lessons})


# --- what is learned ------------------------------------------------------------------------------------------------


def head_stores(policy: SparseVLM, head: EvidenceHead, plans: Sequence[str]) -> dict[str, ScanStore]:
    """The images that a head is trained on, plan by plan.

    Raises:
        ValueError: if the family cannot follow one of the plans.
    """
    fresh = copy.copy(policy.backbone)
    fresh.evidence_head = head
    for name in plans:
        if refusal := get_plan(name).refusal(fresh):
            raise ValueError(refusal)
    return {name: ScanStore(policy, plan=get_plan(name)) for name in plans}


def head_lessons(
    policy: SparseVLM, records: Sequence[Record], stores: Mapping[str, ScanStore], options: DistillOptions
) -> list[HeadLesson]:
    """The questions for which the teacher has a box, with the cells that its boxes keep; for each plan."""
    out, whole = [], ScanStore(policy, plan=get_plan("two_pass"))
    for batch in _batches(records, options.batch_size):
        taught: list[list[Sequence[Box]]] = [[] for _ in batch]
        if options.teacher != "gold":
            queries = [Query(s, r.question, r.kind) for s, r in zip(whole.get(batch), batch, strict=True)]
            for own, (rollout,) in zip(taught, policy.localize(queries, Sampling(options.max_tokens)), strict=True):
                own.append(rollout.response.boxes)
        if options.teacher != "own":
            for own, record in zip(taught, batch, strict=True):
                own.append(record.boxes or ())
        for name, store in stores.items():
            for record, scan, all_boxes in zip(batch, store.get(batch), taught, strict=True):
                grid = Query(scan, record.question).grid
                masks = [select(grid, boxes, policy.spec.keep).mask for boxes in all_boxes if boxes]
                if masks:
                    target = torch.from_numpy(np.mean(masks, axis=0, dtype=np.float32))
                    out.append(HeadLesson(record, target, name))
    return out


def split_by_image(
    lessons: Sequence[HeadLesson], share: float, seed: int
) -> tuple[list[HeadLesson], list[HeadLesson]]:
    """Lessons to train on and to validate on; all questions about an image are on the same side."""

    def held_out(lesson: HeadLesson) -> bool:
        name = "\0".join([str(seed), *(path.name for path in lesson.record.image_paths)])
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < share * 2**64

    return [one for one in lessons if not held_out(one)], [one for one in lessons if held_out(one)]


@dataclass
class HeadStates:
    """Hidden states of questions after the first layers; kept as far as memory allows, else computed again.

    Attributes:
        policy: the model.
        stores: its images, by plan.
        layers: number of layers.
        memory: largest number of bytes to keep.
    """

    policy: SparseVLM
    stores: Mapping[str, ScanStore]
    layers: int
    memory: int
    _kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _bytes: int = 0

    def of(self, lessons: Sequence[HeadLesson]) -> list[tuple[Tensor, Tensor]]:
        """For each lesson the states of its visual tokens (N, hidden) and of its text (Q, hidden)."""
        keys = [(one.plan, one.record.id) for one in lessons]
        missing = {key: one for key, one in zip(keys, lessons, strict=True) if key not in self._kept}
        fresh = dict(zip(missing, self._run(list(missing.values())), strict=True)) if missing else {}
        for key, pair in fresh.items():
            size = sum(tensor.nbytes for tensor in pair)
            if self._bytes + size <= self.memory:
                self._kept[key], self._bytes = pair, self._bytes + size
        return [fresh[key] if key in fresh else self._kept[key] for key in keys]

    def _run(self, lessons: Sequence[HeadLesson]) -> list[tuple[Tensor, Tensor]]:
        branches = self.policy.branches
        scans = [self.stores[one.plan].get([one.record])[0] for one in lessons]
        queries = [Query(s, one.record.question, one.record.kind) for s, one in zip(scans, lessons, strict=True)]
        prompts = [branches.reason_prompt(query) for query in queries]
        early = run_early(self.policy.engine, prompts, [None] * len(prompts), self.layers)
        out = []
        for query, prompt, run in zip(queries, prompts, early, strict=True):
            if run.states is None:
                raise ValueError("the first layers left no states; this is a bug, please report it")
            visual = run.states[prompt.is_visual][: query.grid.num_tokens]
            out.append((visual.clone(), run.states[~prompt.is_visual]))
        return out


# --- learning -------------------------------------------------------------------------------------------------------


def fit_head(
    head: EvidenceHead,
    training: Sequence[HeadLesson],
    held_out: Sequence[HeadLesson],
    states: HeadStates,
    options: DistillOptions,
    progress: Callable[[str], object],
) -> tuple[int, list[tuple[int, float, float]]]:
    """Train a head until the loss on the held-out questions falls no more; it ends with the weights of the lowest.

    Returns:
        The number of updates of these weights, and (update, training loss, validation loss) at each look.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    rng, queue = np.random.default_rng(options.seed), list[int]()
    losses: list[tuple[int, float, float]] = []
    best, since, kept = (np.inf, 0), 0, {name: value.clone() for name, value in head.state_dict().items()}
    running: list[float] = []
    for step in range(1, options.steps + 1):
        while len(queue) < options.batch_size:
            queue.extend(rng.permutation(len(training)).tolist())
        batch, queue = [training[i] for i in queue[: options.batch_size]], queue[options.batch_size :]
        loss = head_loss(head, batch, states, options.evidence_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running.append(loss.item())
        if step % options.every and step < options.steps:
            continue
        with torch.no_grad():
            parts = [head_loss(head, b, states, options.evidence_weight).item() for b in _batches(held_out, 64)]
            sizes = [len(b) for b in _batches(held_out, 64)]
        losses.append((step, float(np.mean(running)), float(np.average(parts, weights=sizes))))
        running.clear()
        progress(f"update {step}: loss {losses[-1][1]:.4f}, on held-out images {losses[-1][2]:.4f}")
        since += 1
        if losses[-1][2] < best[0]:
            best, since = (losses[-1][2], step), 0
            kept = {name: value.clone() for name, value in head.state_dict().items()}
        if since == options.patience:
            break
    head.load_state_dict(kept)
    return best[1], losses


def head_loss(head: EvidenceHead, lessons: Sequence[HeadLesson], states: HeadStates, weight: float) -> Tensor:
    """Binary cross-entropy of scores against cells of evidence, mean over the tokens of a question, then questions."""
    losses = []
    for lesson, (visual, text) in zip(lessons, states.of(lessons), strict=True):
        target = lesson.target.to(visual.device)
        cell = torch.nn.functional.binary_cross_entropy_with_logits(
            head(visual, text), target, pos_weight=torch.tensor(weight, device=visual.device)
        )
        losses.append(cell)
    return torch.stack(losses).mean()


@torch.no_grad()
def recall_by_template(
    head: EvidenceHead, lessons: Sequence[HeadLesson], states: HeadStates
) -> dict[str, dict[float, float]]:
    """Share of the teacher's cells among the best ones, by template and kept share; mean over questions."""
    found: dict[str, list[list[float]]] = {}
    several = len({lesson.plan for lesson in lessons}) > 1
    for batch in _batches(lessons, 64):
        for lesson, (visual, text) in zip(batch, states.of(batch), strict=True):
            scores, target = head(visual, text).cpu().numpy(), lesson.target.numpy()
            row = [float(target[_best(scores, share)].sum() / target.sum()) for share in SHARES]
            for name in ("all", lesson.record.meta.get("template", "none")):
                found.setdefault(f"{lesson.plan}: {name}" if several else name, []).append(row)
    return {name: dict(zip(SHARES, np.mean(rows, axis=0).tolist(), strict=True)) for name, rows in found.items()}


def _best(scores: NDArray[np.float32], share: float) -> BoolArray:
    return best_cells(TokenGrid.single(1, len(scores)), scores, max(1, round(share * len(scores)))).mask


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
