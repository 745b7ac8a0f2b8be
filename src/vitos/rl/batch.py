"""What one branch's loss sees of a rollout batch: prompts, completions and the sums of their advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitos.config.options import DualStreamOptions
from vitos.core.prompt import Prompt
from vitos.engines.base import Completion
from vitos.rl.advantages import FloatArray, group_advantages, informative, split_signs
from vitos.rl.metrics import stack
from vitos.rl.rollout import QuestionGroup, RolloutBatch
from vitos.rl.schedule import LOCALIZATION, REASONING


@dataclass(frozen=True, slots=True)
class BranchBatch:
    """Prompts of one branch with the completions that share them.

    Attributes:
        completions: for every prompt, its completions.
        positive, negative: for every prompt, A⁺ and A⁻ of its completions (see `policy_loss`).
        repeats: times that each completion stands in the loss: K for localizations, 1 for reasonings.
        skipped: groups left out because all their outcomes are equal.
    """

    prompts: list[Prompt]
    completions: list[list[Completion]]
    positive: list[FloatArray]
    negative: list[FloatArray]
    repeats: int
    skipped: int

    @property
    def token_ids(self) -> list[list[Tensor]]:
        return [[c.token_ids for c in siblings] for siblings in self.completions]

    @property
    def tokens(self) -> int:
        """Tokens in the mean, repeats counted, at least 1."""
        return max(1, self.repeats * sum(len(c.token_ids) for siblings in self.completions for c in siblings))

    def part(self, index: Sequence[int]) -> BranchBatch:
        """The prompts of `index` only."""
        return BranchBatch(
            [self.prompts[i] for i in index],
            [self.completions[i] for i in index],
            [self.positive[i] for i in index],
            [self.negative[i] for i in index],
            self.repeats,
            self.skipped,
        )

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampler's log-probabilities (R, L), A⁺ (R,) and A⁻ (R,), padded and placed like `like` (R, L)."""
        old = torch.zeros_like(like)
        for row, completion in enumerate(c for siblings in self.completions for c in siblings):
            old[row, : len(completion.logprobs)] = completion.logprobs.to(like.device)
        positive, negative = (
            torch.from_numpy(np.concatenate(sums)).to(like.device, torch.float32)
            for sums in (self.positive, self.negative)
        )
        return old, positive, negative


def signal(groups: Sequence[QuestionGroup], branch: str, options: DualStreamOptions) -> NDArray[np.bool_]:
    """Pairs that a branch learns from, shape (P, G, K): those whose outcomes differ within their advantage group.

    Outcomes of the localization branch are the answers of both branches and the IoU, of the reasoning branch its
    answers.
    """
    sparse = stack(groups, "sparse_accuracy")
    if not options.skip_equal_outcomes:
        return np.ones(sparse.shape, dtype=bool)
    if branch == REASONING:
        return informative(sparse, group=options.advantage_group)
    once = [np.broadcast_to(stack(groups, term)[..., None], sparse.shape) for term in ("accuracy", "iou")]
    return informative(*once, sparse)


def count_with_signal(
    groups: Sequence[QuestionGroup], weights: Mapping[str, float], options: DualStreamOptions
) -> int:
    """Questions that at least one of the trained branches (weight > 0) learns from."""
    if not groups:
        return 0
    trained = [signal(groups, branch, options) for branch, weight in weights.items() if weight > 0]
    return int(np.any(trained, axis=(0, 2, 3)).sum())


def localization_batch(batch: RolloutBatch, options: DualStreamOptions) -> BranchBatch:
    """The G localizations of each question; O_i stands K times, run once.

    The baseline is always the question's: within one localization there is nothing to compare.
    """
    rewards = np.stack([group.rewards.localization for group in batch.groups])
    advantages = group_advantages(
        rewards, group="pair", scale=options.scale_advantages, std_floor=options.advantage_std_floor
    )
    used = signal(batch.groups, LOCALIZATION, options)
    positive, negative = split_signs(advantages)
    index = [p for p in range(len(batch.groups)) if used[p].any()]
    return BranchBatch(
        prompts=[batch.localize_prompts[p] for p in index],
        completions=[[r.completion for r in batch.groups[p].localizations] for p in index],
        positive=[positive[p] for p in index],
        negative=[negative[p] for p in index],
        repeats=rewards.shape[-1],
        skipped=len(batch.groups) - len(index),
    )


def reasoning_batch(batch: RolloutBatch, options: DualStreamOptions) -> BranchBatch:
    """The K reasonings of each localization, each standing once."""
    rewards = np.stack([group.rewards.reasoning for group in batch.groups])
    advantages = group_advantages(
        rewards,
        group=options.advantage_group,
        scale=options.scale_advantages,
        std_floor=options.advantage_std_floor,
    ).reshape(-1, rewards.shape[-1])
    used = signal(batch.groups, REASONING, options)
    completions = [[r.completion for r in row] for group in batch.groups for row in group.reasonings]
    index = np.flatnonzero(used.reshape(-1, rewards.shape[-1]).any(-1))
    groups = used.any(-1).any(-1) if options.advantage_group == "pair" else used.any(-1)
    return BranchBatch(
        prompts=[batch.reason_prompts[i] for i in index],
        completions=[completions[i] for i in index],
        positive=[np.maximum(advantages[i], 0) for i in index],
        negative=[np.minimum(advantages[i], 0) for i in index],
        repeats=1,
        skipped=int((~groups).sum()),
    )
