"""The part of a rollout batch that one branch's loss needs: prompts, completions and the sums of their advantages.

Axes: P questions, G localizations per question, K reasonings per localization; in a micro-batch, R completions of at
most L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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

BUILT_IN_TERMS = ("format", "iou", "accuracy", "sparse_format", "sparse_accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchBatch:
    """Prompts of one branch with the completions that share them.

    Attributes:
        prompts: the P prompts whose completions take part.
        completions: completions of each prompt.
        positive, negative: A⁺ and A⁻ of each prompt's completions (see `policy_loss`), 0 where nothing is learnt.
        repeats: number of times that each completion counts in the loss: K for localizations, 1 for reasonings.
        mean_tokens, mean_completions: number of tokens and of completions that the mean of the policy gradient runs
            over, repeats counted.
        skipped: number of groups that the policy gradient leaves out because all their outcomes are equal.
    """

    prompts: list[Prompt]
    completions: list[list[Completion]]
    positive: list[FloatArray]
    negative: list[FloatArray]
    repeats: int
    mean_tokens: int
    mean_completions: int
    skipped: int

    @property
    def token_ids(self) -> list[list[Tensor]]:
        """Token ids of each prompt's completions."""
        return [[c.token_ids for c in siblings] for siblings in self.completions]

    @property
    def tokens(self) -> int:
        """Number of tokens of all completions, repeats counted: what the mean of a KL term runs over."""
        return self.repeats * sum(len(c.token_ids) for siblings in self.completions for c in siblings)

    @property
    def all_completions(self) -> int:
        """Number of all completions, repeats counted."""
        return self.repeats * sum(map(len, self.completions))

    def part(self, index: Sequence[int]) -> BranchBatch:
        """The prompts of `index` only."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in index],
            completions=[self.completions[i] for i in index],
            positive=[self.positive[i] for i in index],
            negative=[self.negative[i] for i in index],
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

    Outcomes of the localization branch are the answers of both branches and the IoU; of the reasoning branch its
    answers; of each also the user's rewards.
    """
    sparse = stack(groups, "sparse_accuracy")  # (P, G, K)
    if not options.skip_equal_outcomes:
        return np.ones(sparse.shape, dtype=bool)
    extra = [stack(groups, term) for term in groups[0].rewards.terms if term not in BUILT_IN_TERMS]
    if branch == REASONING:
        return informative(sparse, *(term for term in extra if term.ndim == 3), group=options.advantage_group)
    once = [stack(groups, "accuracy"), stack(groups, "iou"), *(term for term in extra if term.ndim == 2)]
    return informative(sparse, *(np.broadcast_to(term[..., None], sparse.shape) for term in once))


def count_with_signal(
    groups: Sequence[QuestionGroup], weights: Mapping[str, float], options: DualStreamOptions
) -> int:
    """Number of questions that at least one of the trained branches (weight > 0) learns from."""
    if not groups:
        return 0
    trained = [signal(groups, branch, options) for branch, weight in weights.items() if weight > 0]  # (P, G, K) each
    return int(np.any(trained, axis=(0, 2, 3)).sum())


def localization_batch(batch: RolloutBatch, options: DualStreamOptions, *, everything: bool = False) -> BranchBatch:
    """The G localizations of each question; O_i counts K times, run once.

    The baseline is always the question's: within one localization there is nothing to compare.

    Args:
        everything: completions without a signal take part as well, with advantages of 0: a KL term acts on all.
    """
    rewards = np.stack([group.rewards.localization for group in batch.groups])  # (P, G, K)
    advantages = group_advantages(
        rewards, group="pair", scale=options.scale_advantages, std_floor=options.advantage_std_floor
    )
    used = np.any(signal(batch.groups, LOCALIZATION, options), axis=(1, 2))  # (P,)
    positive, negative = split_signs(advantages * used[:, None, None])  # (P, G)
    return _assemble(
        prompts=batch.localize_prompts,
        completions=[[r.completion for r in group.localizations] for group in batch.groups],
        positive=positive,
        negative=negative,
        used=used,
        repeats=rewards.shape[-1],
        skipped=int((~used).sum()),
        options=options,
        everything=everything,
    )


def reasoning_batch(batch: RolloutBatch, options: DualStreamOptions, *, everything: bool = False) -> BranchBatch:
    """The K reasonings of each localization, each counting once; `everything` as in `localization_batch`."""
    rewards = np.stack([group.rewards.reasoning for group in batch.groups])  # (P, G, K)
    advantages = group_advantages(
        rewards,
        group=options.advantage_group,
        scale=options.scale_advantages,
        std_floor=options.advantage_std_floor,
    )
    signals = np.any(signal(batch.groups, REASONING, options), axis=-1)  # (P, G)
    advantages = (advantages * signals[..., None]).reshape(-1, rewards.shape[-1])  # (P·G, K)
    groups = np.any(signals, axis=-1) if options.advantage_group == "pair" else signals
    return _assemble(
        prompts=batch.reason_prompts,
        completions=[[r.completion for r in row] for group in batch.groups for row in group.reasonings],
        positive=np.maximum(advantages, 0),
        negative=np.minimum(advantages, 0),
        used=signals.ravel(),
        repeats=1,
        skipped=int((~groups).sum()),
        options=options,
        everything=everything,
    )


def _assemble(
    *,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    positive: FloatArray,
    negative: FloatArray,
    used: NDArray[np.bool_],
    repeats: int,
    skipped: int,
    options: DualStreamOptions,
    everything: bool,
) -> BranchBatch:
    """The prompts that take part; completions that were cut off are left out of the policy gradient if asked for."""
    counted = np.array(
        [[c.finished or not options.mask_truncated for c in siblings] for siblings in completions], dtype=bool
    ).reshape(positive.shape)
    lengths = np.array([[len(c.token_ids) for c in siblings] for siblings in completions]).reshape(positive.shape)
    in_mean = counted & (used[:, None] if options.token_mean == "kept" else True)
    index = range(len(prompts)) if everything else np.flatnonzero(used).tolist()
    return BranchBatch(
        prompts=[prompts[i] for i in index],
        completions=[list(completions[i]) for i in index],
        positive=[positive[i] * counted[i] for i in index],
        negative=[negative[i] * counted[i] for i in index],
        repeats=repeats,
        mean_tokens=repeats * int(lengths[in_mean].sum()),
        mean_completions=repeats * int(in_mean.sum()),
        skipped=skipped,
    )
