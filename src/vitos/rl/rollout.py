"""G localization and G×K reasoning rollouts of each question, with their rewards: what one update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vitos.data.record import Record
from vitos.engines.base import Sampling, derive_seed
from vitos.geometry import TokenGrid
from vitos.plans import PLANS
from vitos.policy import Query, Rollout, Scan, SparseVLM, Stopwatch
from vitos.prompt import Prompt
from vitos.rl.rewards import ExtraReward, GroupRewards, RewardWeights, group_rewards
from vitos.sparsify import Selection


@dataclass(frozen=True, slots=True)
class QuestionGroup:
    """All rollouts of one question.

    Attributes:
        localizations: O_i, length G; `selections` are the visual tokens that their boxes keep, of `grid`.
        reasonings: O'_ij, G rows of K.
    """

    record: Record
    query: Query
    localizations: list[Rollout]
    selections: list[Selection]
    reasonings: list[list[Rollout]]
    rewards: GroupRewards
    grid: TokenGrid

    def without_embeddings(self) -> QuestionGroup:
        """The same group, its visual tokens' embeddings left out, small enough to be sent to other processes."""
        visuals = tuple(
            replace(v, embeddings=v.embeddings.new_empty(v.grid.num_tokens, 0).cpu(), streams=())
            for v in self.query.scan.visuals
        )
        return replace(self, query=replace(self.query, scan=Scan(visuals)))


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one update and the prompts they were sampled from.

    Attributes:
        localize_prompts: one for each question (P).
        reason_prompts: one for each localization (P×G).
    """

    groups: list[QuestionGroup]
    localize_prompts: list[Prompt]
    reason_prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How rollouts are drawn.

    Attributes:
        num_localizations, num_reasonings: G and K.
        seed: of the run; every completion's seed follows from it, the step, the record's id, the branch, i and j.
        dense: reasoning sees all tokens, whatever the boxes (RL without pruning).
    """

    num_localizations: int
    num_reasonings: int
    localize: Sampling
    reason: Sampling
    seed: int
    dense: bool = False


@torch.no_grad()
def roll_out(
    policy: SparseVLM,
    records: Sequence[Record],
    scans: Sequence[Scan],
    step: int,
    plan: RolloutPlan,
    weights: RewardWeights,
    extra_rewards: Sequence[ExtraReward] = (),
    localizer: SparseVLM | None = None,
    watch: Stopwatch | None = None,
) -> RolloutBatch:
    """Sample both branches and reward them.

    Args:
        policy: samples the reasoning branch, and the localization branch unless
        localizer: another policy (frozen stage-1 weights) writes the boxes.
        step: number of the update, part of every seed.
    """
    watch = watch or Stopwatch()
    queries = [Query(scan, record.question) for record, scan in zip(records, scans, strict=True)]

    def seeds(record: Record, branch: str, *index: int) -> int:
        return derive_seed(plan.seed, step, record.id, branch, *index)

    first = [[seeds(r, "localization", i) for i in range(plan.num_localizations)] for r in records]
    localize_prompts = policy.localize_prompts(queries)
    # Both branches go on behind one dense pass over the image. A frozen localizer does not: the keys are not its own.
    shared = policy.with_prefixes(queries, watch) if policy.spec.plan == "gather" else queries
    localizations = (localizer or policy).localize(shared, plan.localize, first, watch, localize_prompts)

    flat_queries = [query for query in shared for _ in range(plan.num_localizations)]
    responses = [rollout.response for row in localizations for rollout in row]
    method = PLANS["dense" if plan.dense else policy.spec.plan]
    looks = method.looks(policy, flat_queries, responses, watch)
    reason_prompts, selections = [look.prompt for look in looks], [look.selection for look in looks]
    second = [
        [seeds(record, "reasoning", i, j) for j in range(plan.num_reasonings)]
        for record in records
        for i in range(plan.num_localizations)
    ]
    flat = policy.reason(flat_queries, selections, plan.reason, second, watch, reason_prompts)
    size = plan.num_localizations
    groups = []
    for p, (record, query) in enumerate(zip(records, queries, strict=True)):
        own = slice(p * size, (p + 1) * size)
        reasonings = flat[own]
        rewards = group_rewards(
            record,
            [rollout.response for rollout in localizations[p]],
            [[rollout.response for rollout in row] for row in reasonings],
            weights,
            extra_rewards,
        )
        grid = looks[p * size].grid
        groups.append(QuestionGroup(record, query, localizations[p], selections[own], reasonings, rewards, grid))
    return RolloutBatch(groups, localize_prompts, reason_prompts)


def rollout_metrics(groups: Sequence[QuestionGroup]) -> dict[str, float]:
    """The figures of one update's questions that are logged.

    `fallback_rate` and `parse_rate` are shares of the localizations; `whole_image_rate` of boxes with more than 0.9 of
    the image; `group_std` is the standard deviation of a question's rewards, averaged, and `zero_std_rate` the share
    of questions without any.
    """
    localizations = [r for g in groups for r in g.localizations]
    reasonings = [r for g in groups for row in g.reasonings for r in row]
    selections = [s for g in groups for s in g.selections]
    boxes = [len(r.response.boxes) for r in localizations]
    whole = [any(b.area > 0.9 for b in r.response.boxes) for r in localizations]
    spread = np.array([[g.rewards.localization.std(), g.rewards.reasoning.std()] for g in groups])
    metrics = {
        "reward/localization": float(np.mean([g.rewards.localization.mean() for g in groups])),
        "reward/reasoning": float(np.mean([g.rewards.reasoning.mean() for g in groups])),
        "accuracy/localization": float(stack(groups, "accuracy").mean()),
        "accuracy/sparse": float(stack(groups, "sparse_accuracy").mean()),
        "kept_ratio": float(np.mean([s.kept_ratio for s in selections])),
        "fallback_rate": float(np.mean([s.fallback for s in selections])),
        "parse_rate": float(np.mean([r.response.evidence_parsed for r in localizations])),
        "no_answer_rate": float(np.mean([r.response.answer is None for r in reasonings])),
        "boxes_per_response": float(np.mean(boxes)),
        "whole_image_rate": float(np.mean(whole)),
        "truncated_rate": float(np.mean([not r.completion.finished for r in [*localizations, *reasonings]])),
        "group_std/localization": float(spread[:, 0].mean()),
        "group_std/reasoning": float(spread[:, 1].mean()),
        "zero_std_rate": float((spread.max(1) < 1e-9).mean()),
        "tokens/localization": float(np.mean([len(r.completion.token_ids) for r in localizations])),
        "tokens/reasoning": float(np.mean([len(r.completion.token_ids) for r in reasonings])),
    }
    for term in groups[0].rewards.terms:
        if term not in ("accuracy", "sparse_accuracy"):
            values = stack(groups, term)
            if not np.isnan(values).all():
                metrics[f"reward/{term}"] = float(np.nanmean(values))
    metrics["iou"] = metrics.get("reward/iou", float("nan"))
    return metrics


def stack(groups: Sequence[QuestionGroup], term: str) -> NDArray[np.float64]:
    """A reward term of all groups, shape (P, G) or (P, G, K)."""
    return np.stack([group.rewards.terms[term] for group in groups])
