"""G localization and G×K reasoning rollouts of each question, with their rewards: what one update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vitos.core.prompt import Prompt
from vitos.core.record import Record
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling, derive_seed
from vitos.policy.plans.dense import Dense
from vitos.policy.types import Query, Rollout, Scan
from vitos.policy.vlm import SparseVLM
from vitos.rl.rewards import ExtraReward, GroupRewards, RewardWeights, group_rewards


@dataclass(frozen=True, slots=True)
class QuestionGroup:
    """All rollouts of one question.

    Attributes:
        localizations: O_i, length G.
        kept: visual tokens that the boxes of each localization keep, length G.
        reasonings: O'_ij, G rows of K.
    """

    record: Record
    query: Query
    localizations: list[Rollout]
    kept: list[Kept]
    reasonings: list[list[Rollout]]
    rewards: GroupRewards

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
    branches, method = policy.branches, Dense("dense") if plan.dense else policy.plan
    localize_prompts = [branches.localize_prompt(query) for query in queries]
    # Both branches go on behind one dense pass over the image. A frozen localizer does not: the keys are not its own.
    shared = policy.with_prefixes(queries, watch) if policy.plan.shares_prefix else queries
    localizations = (localizer or policy).localize(shared, plan.localize, first, watch, localize_prompts)

    with watch.span(method.timed_as):
        rows = [
            method.reason(branches, query, [rollout.response.boxes for rollout in row], watch)
            for query, row in zip(shared, localizations, strict=True)
        ]
    reason_prompts = [one.prompt for row in rows for one in row]
    flat_queries = [query for query in shared for _ in range(plan.num_localizations)]
    second = [
        [seeds(record, "reasoning", i, j) for j in range(plan.num_reasonings)]
        for record in records
        for i in range(plan.num_localizations)
    ]
    flat = policy.reason(flat_queries, reason_prompts, plan.reason, second, watch)
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
        kept = [one.kept for one in rows[p]]
        groups.append(QuestionGroup(record, query, localizations[p], kept, reasonings, rewards))
    return RolloutBatch(groups, localize_prompts, reason_prompts)
