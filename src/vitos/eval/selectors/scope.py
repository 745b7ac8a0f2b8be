"""SCOPE."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector


@selector(title="SCOPE", needs=("encoder_attention",), rank=94)
def scope(task: Task, count: int) -> Choice:
    """SCOPE: greedy choice by encoder attention times what a token adds to the coverage of the image."""
    order = task.once_per_scan("scope", lambda: salient_coverage_order(task.tokens, task.attention.received))
    return Choice(mask_of(order[:count], task.grid.num_tokens), fusion=NO_FUSION)


def salient_coverage_order(tokens: Tensor, attention: Tensor, count: int | None = None) -> Tensor:
    """The first `count` tokens (N, hidden), by default all, in the greedy order.

    The image is covered by Σ_i max(0, max_{s chosen} cos(i, s)); a token's gain is what it adds to that, times its
    attention (N,).
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    similar = unit @ unit.T
    covered = torch.zeros(len(tokens), 1, dtype=tokens.dtype)
    taken = torch.zeros(len(tokens), dtype=torch.bool)
    order = []
    for _ in range(len(tokens) if count is None else count):
        gain = (similar - covered).clamp(min=0).sum(0) * attention
        chosen = int(gain.masked_fill(taken, -torch.inf).argmax())
        order.append(chosen)
        taken[chosen] = True
        covered = torch.maximum(covered, similar[:, [chosen]])
    return torch.tensor(order)
