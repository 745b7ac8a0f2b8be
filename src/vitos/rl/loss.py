"""The policy-gradient loss (docs/method.md, section 9): a pure function of tensors. Its forms: `objectives.py`.

Axes: R completions, L tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitos.rl.objectives import LOSSES, Ratios


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
        entropies: entropy of the policy's distribution at each token, with gradients, (R, L), or None without such a
            term.
        repeats: number of times that each completion occurs in the batch, for the mean.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    positive: Tensor
    negative: Tensor
    reference_logprobs: Tensor | None = None
    entropies: Tensor | None = None
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
        clipped: number of tokens whose ratio or weight was clipped.
        mismatch_kl: sum of the k3 estimates of KL(sampler ‖ policy).
        reference_kl: sum of the k3 estimates of KL(policy ‖ reference).
        entropy: sum of the entropies; 0 if they are not known.
    """

    loss: Tensor
    tokens: int
    clipped: float
    mismatch_kl: float
    reference_kl: float
    entropy: float = 0.0


def policy_loss(
    inputs: LossInputs,
    *,
    form: str = "token_mean",
    clip_low: float,
    clip_high: float,
    kl_beta: float = 0.0,
    entropy_beta: float = 0.0,
    denominator: int | None = None,
    importance_cap: float | None = None,
) -> LossOutputs:
    """One form of the loss, by default the clipped objective with a token mean, plus β · KL(policy ‖ reference).

        − Σ_t [ A⁺ · min(ρ_t, 1 + ε_high) + A⁻ · max(ρ_t, 1 − ε_low) ] / tokens,   ρ_t = exp(logp − logp_old)

    which equals −Σ min(ρ A, clip(ρ) A) over the literal repeats of a completion. The KL estimator is k3,
    exp(d) − d − 1 with d = logp_ref − logp. KL and entropy count once per repeat, too, and are averaged as the
    objective is.

    Args:
        inputs: the completions.
        form: a word of `LOSSES`.
        clip_low, clip_high: ε_low and ε_high.
        kl_beta: β.
        entropy_beta: weight of the entropy, which is maximised.
        denominator: what the sum over the whole batch (all micro-batches and processes) is divided by, from
            `LossForm.denominator`; None for the number of tokens or completions in the micro-batch. The losses of
            micro-batches add up to the loss of the batch.
        importance_cap: largest weight of a token that another engine sampled (truncated importance sampling). Each
            token's term is multiplied by min(ρ_t, importance_cap), a constant, and the ratio in the term starts at 1.
            Here ρ_t differs from 1 because the engines differ, not because the policy has moved, so it is corrected
            and not clipped to a band; `clipped` then counts the weights that were cut.

    Raises:
        ValueError: without a denominator, for a form that divides by the length limit.
    """
    loss = LOSSES[form]
    log_ratio = torch.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0)  # (R, L): log ρ
    objective = loss.objective(
        Ratios(
            logprobs=inputs.logprobs,
            log_ratio=log_ratio,
            mask=inputs.mask,
            positive=inputs.positive[:, None],
            negative=inputs.negative[:, None],
            clip_low=clip_low,
            clip_high=clip_high,
            importance_cap=importance_cap,
        )
    )
    value, reference_kl, entropy = _regularised(objective.value, inputs, kl_beta, entropy_beta)
    total = torch.where(inputs.mask, value * loss.weights(inputs.mask, value.dtype), 0.0).sum()
    with torch.no_grad():
        # k3 of KL(sampler ‖ policy): 0 if both are the same model, and below 0 only by rounding.
        mismatch = (log_ratio.expm1() - log_ratio).clamp(min=0)
    if denominator is None:
        if loss.unit == "limit":
            raise ValueError(f"the loss {form} needs a denominator: the length limit is not in the inputs")
        denominator = loss.denominator(inputs.tokens, inputs.repeats * len(inputs.mask), limit=0)
    return LossOutputs(
        loss=-total / denominator,
        tokens=int(inputs.mask.sum()),
        clipped=float((objective.clipped & inputs.mask).sum()),
        mismatch_kl=float(mismatch.sum()),
        reference_kl=reference_kl,
        entropy=entropy,
    )


def _regularised(
    value: Tensor, inputs: LossInputs, kl_beta: float, entropy_beta: float
) -> tuple[Tensor, float, float]:
    """The objective (R, L) less the KL to the reference, plus the entropy; and the sums of both over tokens."""
    reference_kl = entropy = 0.0
    if inputs.reference_logprobs is not None:
        gap = torch.where(inputs.mask, inputs.reference_logprobs - inputs.logprobs, 0.0)
        k3 = gap.exp() - gap - 1  # (R, L)
        value = value - kl_beta * inputs.repeats * k3
        reference_kl = float(k3.detach().sum())
    if inputs.entropies is not None:
        value = value + entropy_beta * inputs.repeats * inputs.entropies
        entropy = float(inputs.entropies.detach()[inputs.mask].sum())
    return value, reference_kl, entropy
