"""The data of one update: G localization and G×K reasoning rollouts per question, with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vitos.core.prompt import Prompt
from vitos.core.record import Record
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling, derive_seed
from vitos.engines.judge.judge import Judge
from vitos.policy.plans.dense import Dense
from vitos.policy.types import Query, Rollout, Scan
from vitos.policy.vlm import SparseVLM
from vitos.rl.extra import AnsweredQuestion, ExtraReward
from vitos.rl.rewards import GroupRewards, RewardWeights, reward_questions


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionGroup:
    """All rollouts of one question.

    Attributes:
        record: the question as the data set has it.
        query: the question about its scan.
        localizations: rollouts O_i, length G.
        kept: visual tokens that the boxes of each localization keep, length G.
        reasonings: rollouts O'_ij, G rows of K.
        rewards: rewards of both branches.
    """

    record: Record
    query: Query
    localizations: list[Rollout]
    kept: list[Kept]
    reasonings: list[list[Rollout]]
    rewards: GroupRewards

    def without_embeddings(self) -> QuestionGroup:
        """The same group without embeddings of visual tokens, small enough to be sent to other processes."""
        visuals = tuple(
            replace(v, embeddings=v.embeddings.new_empty(v.grid.num_tokens, 0).cpu(), streams=())
            for v in self.query.scan.visuals
        )
        return replace(self, query=replace(self.query, scan=Scan(visuals)))


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one update and the prompts that they were sampled from.

    Attributes:
        groups: the rollouts of each question, length P.
        localize_prompts: one prompt per question, length P.
        reason_prompts: one prompt per localization, length P×G.
    """

    groups: list[QuestionGroup]
    localize_prompts: list[Prompt]
    reason_prompts: list[Prompt]

    def parts(self, count: int) -> list[RolloutBatch]:
        """The batch in `count` parts of whole questions: part m has the questions m, m + count, m + 2·count, …"""
        if count == 1:
            return [self]
        size = len(self.reason_prompts) // max(1, len(self.groups))
        prompts = [self.reason_prompts[p * size : (p + 1) * size] for p in range(len(self.groups))]
        return [
            RolloutBatch(
                self.groups[m::count],
                self.localize_prompts[m::count],
                [prompt for row in prompts[m::count] for prompt in row],
            )
            for m in range(count)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """How rollouts are drawn.

    Attributes:
        num_localizations: G, number of localizations per question.
        num_reasonings: K, number of reasonings per localization.
        localize, reason: length and temperature of each branch.
        seed: the run's seed; the seed of a completion follows from it, the step, the record's id, the branch, i and j.
        dense: whether reasoning sees all tokens, whatever the boxes are (RL without pruning).
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
    options: RolloutOptions,
    weights: RewardWeights,
    extra_rewards: Sequence[ExtraReward] = (),
    localizer: SparseVLM | None = None,
    watch: Stopwatch | None = None,
    judge: Judge | None = None,
) -> RolloutBatch:
    """Sample both branches and reward them.

    Args:
        policy: the policy that samples both branches.
        records: the questions, length P.
        scans: the visual tokens of each question, length P.
        step: number of the update, which is part of each seed.
        options: group sizes, lengths, temperature and seed.
        weights: weights of the built-in rewards.
        extra_rewards: a user's rewards.
        localizer: another policy that writes the boxes (the frozen stage-1 weights); None for `policy`.
        watch: a stopwatch for the spans of both branches, and "reward".
        judge: grades answers in words in place of the rule; None: the rule scores all.
    """
    watch = watch or Stopwatch()
    queries = [Query(scan, record.question, record.kind) for record, scan in zip(records, scans, strict=True)]

    def seeds(record: Record, branch: str, *index: int) -> int:
        return derive_seed(options.seed, step, record.id, branch, *index)

    first = [[seeds(r, "localization", i) for i in range(options.num_localizations)] for r in records]  # (P, G)
    branches, plan = policy.branches, Dense("dense") if options.dense else policy.plan
    localize_prompts = [policy.plan.evidence_prompt(branches, query) for query in queries]
    # Both branches go on behind what they share. A frozen localizer does not: it did not make the keys.
    shared = policy.plan.prepare(branches, policy.engine, queries, watch)
    written = (localizer or policy).localize(shared, options.localize, first, watch, localize_prompts)  # (P, G)
    localizations = [
        [policy.plan.read_evidence(branches, query, rollout) for rollout in row]
        for query, row in zip(shared, written, strict=True)
    ]

    with watch.span(plan.timed_as):
        rows = [  # (P, G)
            plan.reason_after(branches, query, row, watch) for query, row in zip(shared, localizations, strict=True)
        ]
    reason_prompts = [one.prompt for row in rows for one in row]  # (P·G,)
    flat_queries = [query for query in shared for _ in range(options.num_localizations)]
    second = [  # (P·G, K)
        [seeds(record, "reasoning", i, j) for j in range(options.num_reasonings)]
        for record in records
        for i in range(options.num_localizations)
    ]
    flat = policy.reason(flat_queries, reason_prompts, options.reason, second, watch)  # (P·G, K)
    size = options.num_localizations
    reasonings = [flat[p * size : (p + 1) * size] for p in range(len(records))]  # (P, G, K)
    with watch.span("reward"):
        answered = list(map(_answered, records, localizations, reasonings))
        rewards = reward_questions(answered, weights, extra_rewards, judge)
    groups = [
        QuestionGroup(
            record=records[p],
            query=queries[p],
            localizations=localizations[p],
            kept=[one.kept for one in rows[p]],
            reasonings=reasonings[p],
            rewards=rewards[p],
        )
        for p in range(len(records))
    ]
    return RolloutBatch(groups, localize_prompts, reason_prompts)


def _answered(record: Record, first: Sequence[Rollout], second: Sequence[Sequence[Rollout]]) -> AnsweredQuestion:
    """A question with its texts, as rewards see it."""
    return AnsweredQuestion(record, [r.response for r in first], [[r.response for r in row] for row in second])
