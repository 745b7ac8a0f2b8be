"""The forms of the policy-gradient loss: one function, one row of `LOSSES` and one word of `train.loss` each.

A form says what a token adds to the objective and what the sum is divided by. Common to all of them (docs/method.md,
section 9): A⁺ and A⁻ are the sums of a completion's advantages above and below 0. Each function below is linear in the
advantage on either side of 0, so one pass with both sums equals the literal repeat of O_i with its K advantages.

Axes: R completions, L tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["token", "completion", "limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """What the objective of a micro-batch is made of.

    Attributes:
        logprobs: log-probabilities under the policy, with gradients, (R, L).
        log_ratio: log ρ, policy against sampler, with gradients, 0 on padding, (R, L).
        mask: True on the completions' tokens, bool, (R, L).
        positive, negative: A⁺ >= 0 and A⁻ <= 0, (R, 1).
        clip_low, clip_high: ε_low and ε_high.
        importance_cap: largest weight of a token that another engine sampled; None where the policy itself sampled.
    """

    logprobs: Tensor
    log_ratio: Tensor
    mask: Tensor
    positive: Tensor
    negative: Tensor
    clip_low: float
    clip_high: float
    importance_cap: float | None


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be maximised, and where a ratio or a weight was cut.

    Attributes:
        value: the objective of each token, with gradients, (R, L); on padding it may be anything finite.
        clipped: True at tokens that are cut, bool, (R, L).
    """

    value: Tensor
    clipped: Tensor


def token_ratio(ratios: Ratios) -> Objective:
    """PPO's and GRPO's: A⁺ · min(ρ_t, 1 + ε_high) + A⁻ · max(ρ_t, 1 − ε_low)."""
    return _clipped_ratio(ratios, ratios.log_ratio, ratios.logprobs)


def sequence_ratio(ratios: Ratios) -> Objective:
    """GSPO's (arXiv 2507.18071): the same with one ratio per completion, s = exp(mean_t log ρ_t)."""
    return _clipped_ratio(ratios, _mean(ratios.log_ratio, ratios), _mean(ratios.logprobs, ratios))


def clipped_weight(ratios: Ratios) -> Objective:
    """CISPO's (MiniMax-M1, arXiv 2506.13585): min(ρ_t, 1 + ε_high) · A · logp_t; the weight is a constant.

    No token loses its gradient, and there is no lower bound. Where another engine samples, `importance_cap` takes the
    place of 1 + ε_high.
    """
    largest = 1 + ratios.clip_high if ratios.importance_cap is None else ratios.importance_cap
    ratio = ratios.log_ratio.detach().exp()  # (R, L)
    value = ratio.clamp(max=largest) * (ratios.positive + ratios.negative) * ratios.logprobs
    return Objective(value, ratio > largest)


def _clipped_ratio(ratios: Ratios, log_ratio: Tensor, logprobs: Tensor) -> Objective:
    """A⁺ · min(ρ, 1 + ε_high) + A⁻ · max(ρ, 1 − ε_low), with the ratios (R, L) or (R, 1) of given logarithms.

    Where another engine samples, ρ differs from 1 because the engines differ, not because the policy has moved. So it
    is a constant weight, cut at `importance_cap`, and the ratio in the objective starts at 1.
    """
    cap = ratios.importance_cap
    ratio = moved = log_ratio.exp()
    if cap is not None:
        moved = torch.where(ratios.mask, logprobs - logprobs.detach(), 0.0).exp()  # 1, with gradients
    upper, lower = moved.clamp(max=1 + ratios.clip_high), moved.clamp(min=1 - ratios.clip_low)
    value = ratios.positive * upper + ratios.negative * lower
    with torch.no_grad():
        clipped = ((ratio > 1 + ratios.clip_high) & (ratios.positive > 0)) | (
            (ratio < 1 - ratios.clip_low) & (ratios.negative < 0)
        )
    if cap is not None:
        value, clipped = ratio.detach().clamp(max=cap) * value, ratio > cap
    return Objective(value, clipped)


def _mean(values: Tensor, ratios: Ratios) -> Tensor:
    """Mean over each completion's tokens, (R, 1)."""
    total = torch.where(ratios.mask, values, 0.0).sum(1, keepdim=True)
    return total / ratios.mask.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, slots=True)
class LossForm:
    """A row of `LOSSES`.

    Attributes:
        objective: function to the objective of each token.
        unit: what counts once in the mean: a token; a completion, whose tokens are averaged first; or, as a constant
            for each completion, the length limit of its branch.
    """

    objective: Callable[[Ratios], Objective]
    unit: Unit

    def weights(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of the tokens of each completion in the sum, (R, 1)."""
        if self.unit == "completion":
            return mask.sum(1, keepdim=True).clamp(min=1).to(dtype).reciprocal()
        return torch.ones(len(mask), 1, dtype=dtype, device=mask.device)

    def denominator(self, tokens: int, completions: int, limit: int) -> int:
        """What the sum over a whole batch is divided by, at least 1.

        Args:
            tokens, completions: number of tokens and of completions in the mean, repeats counted.
            limit: length limit of a completion, in tokens.

        >>> [LOSSES[name].denominator(90, 4, 100) for name in ("token_mean", "grpo", "dr_grpo")]
        [90, 4, 400]
        """
        return max(1, {"token": tokens, "completion": completions, "limit": completions * limit}[self.unit])


LOSSES: Mapping[str, LossForm] = {
    "token_mean": LossForm(token_ratio, "token"),  # DAPO (arXiv 2503.14476), and EasyR1
    "grpo": LossForm(token_ratio, "completion"),  # DeepSeekMath (arXiv 2402.03300)
    "dr_grpo": LossForm(token_ratio, "limit"),  # Dr. GRPO (arXiv 2503.20783)
    "gspo": LossForm(sequence_ratio, "completion"),
    "cispo": LossForm(clipped_weight, "token"),
}
"""The words of `train.loss`."""
