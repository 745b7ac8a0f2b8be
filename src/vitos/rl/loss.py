"""The clipped policy-gradient loss (docs/method.md, section 9): a pure function of tensors.

Axes: R completions, L tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Completions of one micro-batch.

    Attributes:
        logprobs: log-probabilities of the tokens under the policy, with gradients, float32 (R, L).
        old_logprobs: log-probabilities under the sampler, (R, L).
        mask: True on the completions' tokens, bool (R, L).
        positive, negative: sums of the advantages >= 0 and <= 0 of each completion, (R,). A completion that occurs
            once has its advantage in one of them and 0 in the other.
        reference_logprobs: log-probabilities under the reference model, (R, L), or None without a KL term.
        repeats: number of times that each completion occurs in the batch, for the token mean.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    positive: Tensor
    negative: Tensor
    reference_logprobs: Tensor | None = None
    repeats: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens in the mean, repeats counted."""
        return self.repeats * int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """A loss and its figures, which are sums over tokens (repeats not counted), to be divided by `tokens`.

    Attributes:
        loss: the loss, a scalar with gradients.
        tokens: number of tokens.
        clipped: number of tokens whose ratio was clipped.
        mismatch_kl: sum of the k3 estimates of KL(sampler ‖ policy).
        reference_kl: sum of the k3 estimates of KL(policy ‖ reference).
    """

    loss: Tensor
    tokens: int
    clipped: float
    mismatch_kl: float
    reference_kl: float


def policy_loss(
    inputs: LossInputs,
    *,
    clip_low: float,
    clip_high: float,
    kl_beta: float = 0.0,
    denominator: int | None = None,
    importance_cap: float | None = None,
) -> LossOutputs:
    """Clipped objective of GRPO with a token mean, plus β · KL(policy ‖ reference).

        − Σ_t [ A⁺ · min(ρ_t, 1 + ε_high) + A⁻ · max(ρ_t, 1 − ε_low) ] / tokens,   ρ_t = exp(logp − logp_old)

    which equals −Σ min(ρ A, clip(ρ) A) over the literal repeats of a completion. The KL estimator is k3,
    exp(d) − d − 1 with d = logp_ref − logp; it counts once per repeat, too.

    Args:
        inputs: the completions.
        clip_low, clip_high: ε_low and ε_high.
        kl_beta: β.
        denominator: number of tokens of the whole batch (all micro-batches and processes), repeats counted; None for
            that of the micro-batch. The losses of micro-batches add up to the loss of the batch.
        importance_cap: largest weight of a token that another engine sampled (truncated importance sampling). Each
            token's term is multiplied by min(ρ_t, importance_cap), a constant, and the ratio in the term starts at 1.
            Here ρ_t differs from 1 because the engines differ, not because the policy has moved, so it is corrected
            and not clipped to a band; `clipped` then counts the weights that were cut.
    """
    log_ratio = torch.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0)  # (R, L)
    ratio = moved = log_ratio.exp()  # (R, L): ρ
    if importance_cap is not None:
        moved = torch.where(inputs.mask, inputs.logprobs - inputs.logprobs.detach(), 0.0).exp()  # 1, with gradients
    upper, lower = moved.clamp(max=1 + clip_high), moved.clamp(min=1 - clip_low)
    objective = inputs.positive[:, None] * upper + inputs.negative[:, None] * lower  # (R, L)
    if importance_cap is not None:
        objective = ratio.detach().clamp(max=importance_cap) * objective
    reference_kl = 0.0
    if inputs.reference_logprobs is not None:
        gap = torch.where(inputs.mask, inputs.reference_logprobs - inputs.logprobs, 0.0)
        k3 = gap.exp() - gap - 1  # (R, L)
        objective = objective - kl_beta * inputs.repeats * k3
        reference_kl = float(k3.detach().sum())
    total = torch.where(inputs.mask, objective, 0.0).sum()
    with torch.no_grad():
        is_clipped = ((ratio > 1 + clip_high) & (inputs.positive[:, None] > 0)) | (
            (ratio < 1 - clip_low) & (inputs.negative[:, None] < 0)
        )
        if importance_cap is not None:
            is_clipped = ratio > importance_cap
        # k3 of KL(sampler ‖ policy): 0 if both are the same model, and below 0 only by rounding.
        mismatch = (log_ratio.expm1() - log_ratio).clamp(min=0)
    return LossOutputs(
        loss=-total / (denominator if denominator is not None else max(1, inputs.tokens)),
        tokens=int(inputs.mask.sum()),
        clipped=float((is_clipped & inputs.mask).sum()),
        mismatch_kl=float(mismatch.sum()),
        reference_kl=reference_kl,
    )
