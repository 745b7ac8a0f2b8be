"""Drawing n of N things without replacement, in an order: the Plackett–Luce distribution.

With scores s, the j-th draw o_j has the probability exp(s_{o_j}) / Σ exp(s) over the things that are left. Adding
Gumbel noise to the scores and sorting draws from it exactly (the "Gumbel top-n trick", arXiv 1903.06059).
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_order(scores: Tensor, count: int, uniform: Tensor) -> Tensor:
    """`count` different indices, in the order in which they are drawn, shape (count,).

    Args:
        scores: scores s, shape (N,).
        count: number of draws, 1..N.
        uniform: uniform numbers in (0, 1), shape (N,); the draw depends on nothing else.

    Raises:
        ValueError: if `count` is not in 1..N.
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"cannot draw {count} of {len(scores)} visual tokens")
    gumbel = -(-uniform.double().clamp(1e-300, 1 - 1e-16).log()).log()
    return torch.argsort(scores.double() + gumbel, descending=True, stable=True)[:count]


def order_entropies(scores: Tensor, order: Tensor) -> Tensor:
    """Entropy of the distribution of each draw given those before it, in nats, shape (n,); as `order_logprobs`."""
    left = torch.ones(len(order), len(scores), dtype=torch.bool, device=scores.device)  # (n, N)
    for step in range(1, len(order)):
        left[step:, order[step - 1]] = False
    logprobs = scores.expand_as(left).masked_fill(~left, torch.finfo(scores.dtype).min).log_softmax(-1)
    return -(logprobs.exp() * logprobs).masked_fill(~left, 0.0).sum(-1)


def order_logprobs(scores: Tensor, order: Tensor) -> Tensor:
    """Log-probability of each draw given those before it, shape (n,); their sum is that of the whole draw.

    >>> order_logprobs(torch.zeros(3), torch.tensor([2, 0])).exp()  # 1 of 3, then 1 of 2
    tensor([0.3333, 0.5000])

    Args:
        scores: scores s, shape (N,); gradients pass through them.
        order: n different indices in the order of the draws, shape (n,).
    """
    drawn = scores[order]  # (n,)
    left = torch.ones_like(scores, dtype=torch.bool)
    left[order] = False
    # Before the last draw, what is left is the last thing drawn and all that never were; so backwards to the first.
    backwards = drawn.flip(0)
    if bool(left.any()):
        rest = scores[left].logsumexp(0, keepdim=True)
        normaliser = torch.cat([rest, backwards]).logcumsumexp(0)[1:]
    else:
        normaliser = backwards.logcumsumexp(0)
    return drawn - normaliser.flip(0)
