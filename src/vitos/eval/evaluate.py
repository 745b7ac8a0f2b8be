"""Run a policy over questions under every condition of algorithm.md §9, greedily, and keep each answer.

A *condition* is one way to answer: which model, and which visual tokens it sees. Controls get exactly as many tokens
as the policy's own boxes kept for that question, so that only the choice of tokens differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitos.core.geometry import BoolArray, Box, TokenGrid, matched_iou
from vitos.core.masks import centre_mask, fit_budget, inverted_mask, oracle_mask, random_mask, shifted_mask
from vitos.core.prompt import Prompt
from vitos.core.record import Record
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import ImageFacts
from vitos.engines.base import Sampling, derive_seed
from vitos.eval.scoring import Verdict, score_answer
from vitos.policy.plans import Limits, get_plan
from vitos.policy.run import answer
from vitos.policy.types import Query, Rollout
from vitos.policy.vlm import SparseVLM
from vitos.scans.cache import EmbeddingCache
from vitos.scans.store import ScanStore

# Masks of a control, given the grid, the policy's boxes and its selection; None: not defined for this question.
Control = Callable[[TokenGrid, Record, Sequence[Box], Kept, np.random.Generator], BoolArray | None]


def _shifted(
    grid: TokenGrid, record: Record, boxes: Sequence[Box], kept: Kept, rng: np.random.Generator
) -> BoolArray | None:
    return shifted_mask(grid, boxes, rng, count=int(kept.mask.sum())) if boxes else None


def _inverted(
    grid: TokenGrid, record: Record, boxes: Sequence[Box], kept: Kept, rng: np.random.Generator
) -> BoolArray | None:
    return None if kept.mask.all() else inverted_mask(grid, kept.mask, rng)


CONTROLS: dict[str, Control] = {
    "random": lambda grid, record, boxes, kept, rng: random_mask(grid, int(kept.mask.sum()), rng),
    "centre": lambda grid, record, boxes, kept, rng: centre_mask(grid, int(kept.mask.sum())),
    "inverted": _inverted,
    "shifted": _shifted,
    "oracle": lambda grid, record, boxes, kept, rng: oracle_mask(grid, record.boxes) if record.boxes else None,
}


@dataclass(frozen=True)
class EvaluationPlan:
    """What is run.

    Attributes:
        controls: also answer from other tokens in the same number.
        budgets: shares of the visual tokens, 0..1, at which own boxes, random, centre, inverted and oracle compete.
        batch_size: questions decoded together.
        max_localization_tokens, max_reasoning_tokens: longest responses.
        seed: of the random controls.
    """

    controls: bool = True
    budgets: tuple[float, ...] = ()
    batch_size: int = 64
    max_localization_tokens: int = 256
    max_reasoning_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One question with its answers by condition, as it stands in `cases.jsonl`."""

    record: Record
    grid: TokenGrid
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: tuple[ImageFacts, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.record.id,
            "template": self.record.meta.get("template", ""),
            "image": str(self.record.image_paths[0]),
            "images": [facts.to_json() for facts in self.images],
            "question": self.record.question,
            "gold": self.record.answer,
            "gold_boxes": [list(box.as_tuple()) for box in self.record.boxes or ()],
            "grid": [{"rect": list(v.rect.as_tuple()), "rows": v.rows, "cols": v.cols} for v in self.grid.views],
            "shown": list(self.grid.shown.as_tuple()),
            "conditions": self.conditions,
        }


def run_policy(
    policy: SparseVLM,
    records: Sequence[Record],
    plan: EvaluationPlan,
    *,
    base: SparseVLM | None = None,
    rl_dense: SparseVLM | None = None,
    watch: Stopwatch | None = None,
    base_watch: Stopwatch | None = None,
    progress: Callable[[int], object] | None = None,
    cache: str | Path | None = None,
) -> Iterator[Case]:
    """Answer every question under every condition.

    Conditions: `localization` and `sparse` (own boxes, own tokens), `dense` (reasoning on all tokens), the controls;
    with `base`: `base_dense`, `untrained_localization` and `untrained_sparse`; with `rl_dense`: `rl_dense`.

    The policy's plan says how `sparse` and `untrained_sparse` come about. Controls follow it under two_pass and
    gather; under coarse and crop, which look at the image again, there are none.

    Args:
        base: the model before training.
        rl_dense: a model trained without pruning.
        watch, base_watch: add up the seconds of the two passes and of the base model's dense pass.
        progress: called with the number of questions done.
        cache: folder of an embedding cache, which must fit the encoder of every model here.

    Raises:
        ValueError: under plan dense, a condition of every evaluation, and for budgets under coarse and crop.
    """
    if not policy.plan.localizes:
        raise ValueError("every evaluation answers densely beside its plan; choose two_pass, gather, coarse or crop")
    if not policy.plan.takes_masks:
        if plan.budgets:
            raise ValueError(
                f"budgets choose among the tokens of one look at the image; plan {policy.spec.plan} has two"
            )
        plan = replace(plan, controls=False)
    watch, base_watch = watch or Stopwatch(), base_watch or Stopwatch()
    reason = Sampling(plan.max_reasoning_tokens)
    limits = Limits(max_tokens=plan.max_reasoning_tokens, max_evidence_tokens=plan.max_localization_tokens)
    stores = {model: _store(model, cache) for model in (policy, base, rl_dense) if model is not None}
    for start in range(0, len(records), plan.batch_size):
        batch = records[start : start + plan.batch_size]
        queries, own = _encode(stores[policy], batch, policy, watch)
        scans = [query.scan for query in queries]
        cases = [Case(r, scan.visuals[0].grid, images=scan.images) for r, scan in zip(batch, scans, strict=True)]

        located, kept = _answer(cases, policy, own, limits, watch, ("localization", "sparse"))
        _note(cases, "dense", [row[0] for row in policy.reason(queries, _dense(policy, queries), reason)])

        for name, masks in _control_masks(cases, located, kept, plan).items():
            index = [i for i, mask in enumerate(masks) if mask is not None]
            asked = [queries[i] for i in index]
            chosen = [Kept(cases[i].grid, mask) for i, mask in enumerate(masks) if mask is not None]
            prompts = [policy.plan.prompt(policy.branches, q, k) for q, k in zip(asked, chosen, strict=True)]
            rows = policy.reason(asked, prompts, reason)
            _note([cases[i] for i in index], name, [row[0] for row in rows], chosen)

        if base is not None:
            with base_watch.span("vision"):
                before = [replace(q, scan=scan) for q, scan in zip(queries, stores[base].get(batch), strict=True)]
            dense = base.reason(before, _dense(base, before), reason, watch=base_watch)
            _note(cases, "base_dense", [row[0] for row in dense])
            own = _for_plan(base, before, Stopwatch())
            _answer(cases, base, own, limits, Stopwatch(), ("untrained_localization", "untrained_sparse"))
        if rl_dense is not None:
            seen = [replace(q, scan=scan) for q, scan in zip(queries, stores[rl_dense].get(batch), strict=True)]
            _note(cases, "rl_dense", [row[0] for row in rl_dense.reason(seen, _dense(rl_dense, seen), reason)])
        yield from cases
        if progress is not None:
            progress(len(batch))


def _dense(model: SparseVLM, queries: Sequence[Query]) -> list[Prompt]:
    return [model.branches.reason_prompt(query) for query in queries]


def _store(model: SparseVLM, cache: str | Path | None) -> ScanStore:
    """Nothing is kept in memory: every image is asked about once, and the seconds of vision are those of encoding."""
    opened = EmbeddingCache.open(cache, model.backbone) if cache else None
    return ScanStore(model, max_bytes=0, cache=opened, plan=get_plan("crop") if model.plan.needs_pictures else None)


def _encode(
    store: ScanStore, batch: Sequence[Record], policy: SparseVLM, watch: Stopwatch
) -> tuple[list[Query], list[Query]]:
    """Questions with all visual tokens, and as the policy's plan begins with them; the watch gets the plan's part."""
    with (Stopwatch() if policy.plan.reduced else watch).span("vision"):
        scans = store.get(batch)
    queries = [Query(scan, record.question, record.kind) for scan, record in zip(scans, batch, strict=True)]
    if policy.plan.shares_prefix:  # the dense condition and the controls share it
        queries = policy.with_prefixes(queries, watch)
    return queries, _for_plan(policy, queries, watch)


def _for_plan(policy: SparseVLM, queries: Sequence[Query], watch: Stopwatch) -> list[Query]:
    """The same questions about reduced images, under plan coarse."""
    if not policy.plan.reduced:
        return list(queries)
    with watch.span("vision"):
        scans = [policy.plan.scan(policy.branches, query.scan.pictures) for query in queries]
    return [replace(query, scan=scan.of_files(query.scan.images)) for query, scan in zip(queries, scans, strict=True)]


def _answer(
    cases: Sequence[Case],
    policy: SparseVLM,
    queries: Sequence[Query],
    limits: Limits,
    watch: Stopwatch,
    names: tuple[str, str],
) -> tuple[list[Rollout], list[Kept]]:
    """Answer by the policy's plan and write both branches into the cases; the localizations and what they kept."""
    outcomes = answer(policy.plan, policy.branches, policy.engine, queries, limits, watch)
    located = [outcome.localization for outcome in outcomes if outcome.localization is not None]
    kept = [outcome.kept for outcome in outcomes]
    _note(cases, names[0], located, boxes=True)
    _note(cases, names[1], [outcome.reasoning for outcome in outcomes], kept)
    return located, kept


def _control_masks(
    cases: Sequence[Case], located: Sequence[Rollout], kept: Sequence[Kept], plan: EvaluationPlan
) -> dict[str, list[BoolArray | None]]:
    """Keep masks by control, and by control and budget as `random@0.25`; `own@…` are the policy's boxes."""
    masks: dict[str, list[BoolArray | None]] = {}
    for case, rollout, selection in zip(cases, located, kept, strict=True):
        boxes = rollout.response.boxes
        rng = np.random.default_rng(derive_seed(plan.seed, "controls", case.record.id))
        if plan.controls:
            for name, control in CONTROLS.items():
                masks.setdefault(name, []).append(control(case.grid, case.record, boxes, selection, rng))
        for budget in plan.budgets:
            for name, mask in _budget_masks(case, boxes, budget, rng).items():
                masks.setdefault(f"{name}@{budget:g}", []).append(mask)
    return masks


def _budget_masks(
    case: Case, boxes: Sequence[Box], budget: float, rng: np.random.Generator
) -> dict[str, BoolArray | None]:
    grid = case.grid
    count = max(1, round(budget * grid.num_tokens))
    own = fit_budget(grid, boxes, count) if boxes else None
    return {
        "own": own,
        "random": random_mask(grid, count, rng),
        "centre": centre_mask(grid, count),
        "inverted": inverted_mask(grid, own, rng) if own is not None and not own.all() else None,
        "oracle": fit_budget(grid, case.record.boxes, count) if case.record.boxes else None,
    }


def _note(
    cases: Sequence[Case],
    name: str,
    rollouts: Sequence[Rollout],
    selections: Sequence[Kept] | None = None,
    boxes: bool = False,
) -> None:
    """Write one condition's answers into the cases."""
    for index, (case, rollout) in enumerate(zip(cases, rollouts, strict=True)):
        response = rollout.response
        scored = score_answer(rollout.completion.text, case.record)
        row: dict[str, Any] = {
            "text": rollout.completion.text,
            "answer": scored.answer,
            "correct": scored.verdict is Verdict.CORRECT,
        }
        if scored.token_f1 is not None:
            row["token_f1"] = scored.token_f1
        if boxes:
            row["boxes"] = [list(box.as_tuple()) for box in response.boxes]
            row["parsed"] = response.evidence_parsed
            row["iou"] = matched_iou(response.boxes, case.record.boxes) if case.record.boxes else None
        if selections is not None:
            selection = selections[index]
            row["kept"] = np.flatnonzero(selection.mask).tolist()
            row["kept_ratio"] = selection.ratio
            row["fallback"] = selection.fallback
        case.conditions[name] = row
