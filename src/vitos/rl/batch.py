"""The part of a rollout batch that one branch's loss needs: prompts, completions and the sums of their advantages.

Axes: P questions, G localizations per question, K reasonings per localization; in a micro-batch, R completions of at
most L tokens.
"""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchBatch:
    """Prompts of one branch with the completions that share them.

    Attributes:
        prompts: the prompts.
        completions: the completions of each prompt.
        positive, negative: A⁺ and A⁻ of each prompt's completions (see `policy_loss`).
        repeats: number of times that each completion occurs in the loss: K for localizations, 1 for reasonings.
        skipped: number of groups left out because all their outcomes are equal.
    """

    prompts: list[Prompt]
    completions: list[list[Completion]]
    positive: list[FloatArray]
    negative: list[FloatArray]
    repeats: int
    skipped: int

    @property
    def token_ids(self) -> list[list[Tensor]]:
        """Token ids of each prompt's completions."""
        return [[c.token_ids for c in siblings] for siblings in self.completions]

    @property
    def tokens(self) -> int:
        """Number of tokens in the mean, repeats counted; at least 1."""
        return max(1, self.repeats * sum(len(c.token_ids) for siblings in self.completions for c in siblings))

    def part(self, index: Sequence[int]) -> BranchBatch:
        """The prompts with the numbers in `index`, and their completions."""
        return BranchBatch(
            prompts=[self.prompts[i] for i in index],
            completions=[self.completions[i] for i in index],
            positive=[self.positive[i] for i in index],
            negative=[self.negative[i] for i in index],
            repeats=self.repeats,
            skipped=self.skipped,
        )

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sampler's log-probabilities (R, L), A⁺ (R,) and A⁻ (R,), padded and placed like `like` (R, L)."""
        old = torch.zeros_like(like)  # (R, L), 0 on padding
        for row, completion in enumerate(c for siblings in self.completions for c in siblings):
            old[row, : len(completion.logprobs)] = completion.logprobs.to(like.device)
        positive, negative = (
            torch.from_numpy(np.concatenate(sums)).to(like.device, torch.float32)
            for sums in (self.positive, self.negative)
        )
        return old, positive, negative


def signal(groups: Sequence[QuestionGroup], branch: str, options: DualStreamOptions) -> NDArray[np.bool_]:
    """True at pairs that a branch learns from, shape (P, G, K): those whose outcomes differ within their group.

    The outcomes of the localization branch are the answers of both branches and the IoU; those of the reasoning branch
    are its answers.
    """
    sparse = stack(groups, "sparse_accuracy")  # (P, G, K)
    if not options.skip_equal_outcomes:
        return np.ones(sparse.shape, dtype=bool)
    if branch == REASONING:
        return informative(sparse, group=options.advantage_group)
    # (P, G) → (P, G, K): a localization has the same outcome with each of its reasonings.
    once = [np.broadcast_to(stack(groups, term)[..., None], sparse.shape) for term in ("accuracy", "iou")]
    return informative(*once, sparse)


def count_with_signal(
    groups: Sequence[QuestionGroup], weights: Mapping[str, float], options: DualStreamOptions
) -> int:
    """Number of questions that at least one of the trained branches (weight > 0) learns from."""
    if not groups:
        return 0
    trained = [signal(groups, branch, options) for branch, weight in weights.items() if weight > 0]  # (P, G, K) each
    return int(np.any(trained, axis=(0, 2, 3)).sum())


def localization_batch(batch: RolloutBatch, options: DualStreamOptions) -> BranchBatch:
    """The G localizations of each question; O_i occurs K times in the loss and is run once.

    The baseline is always the mean of the question: a group of one localization has no other to compare it with.
    """
    rewards = np.stack([group.rewards.localization for group in batch.groups])  # (P, G, K)
    advantages = group_advantages(
        rewards, group="pair", scale=options.scale_advantages, std_floor=options.advantage_std_floor
    )
    used = signal(batch.groups, LOCALIZATION, options)  # (P, G, K)
    positive, negative = split_signs(advantages)  # (P, G)
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
    """The K reasonings of each localization; each occurs once in the loss."""
    rewards = np.stack([group.rewards.reasoning for group in batch.groups])  # (P, G, K)
    advantages = group_advantages(
        rewards,
        group=options.advantage_group,
        scale=options.scale_advantages,
        std_floor=options.advantage_std_floor,
    ).reshape(-1, rewards.shape[-1])  # (P·G, K): one row per prompt
    used = signal(batch.groups, REASONING, options)  # (P, G, K)
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
