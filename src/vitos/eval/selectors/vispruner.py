"""VisPruner."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector

IMPORTANT_SHARE = 0.5
AT_ONCE = 8


@selector(title="VisPruner", needs=("encoder_attention",), rank=86)
def vispruner(task: Task, count: int) -> Choice:
    """VisPruner (arXiv 2412.01818): half of the tokens by encoder attention, half by dropping near copies.

    The authors compare the encoder's features before the projector, here those after it are compared.
    """
    chosen = important_and_diverse(task.tokens, task.attention.received, count)
    return Choice(mask_of(chosen, task.grid.num_tokens), fusion=NO_FUSION)


def important_and_diverse(tokens: Tensor, attention: Tensor, count: int) -> Tensor:
    """Indices of `count` tokens (N, hidden).

    The residual is in the order of falling attention. In one round every second token is compared with all others in
    between, and the up to 8 most similar ones are dropped. The authors' code fails for an odd residual and where fewer
    than 8 pairs are left; here such rounds drop what they can.
    """
    order = torch.sort(attention, descending=True, stable=True).indices
    important = int(count * IMPORTANT_SHARE)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    residual, wanted = order[important:], count - important
    while (surplus := len(residual) - wanted) > 0:
        first, second = residual[::2], residual[1::2]
        likeness = (unit[first] @ unit[second].T).max(-1).values
        falling = torch.sort(likeness, descending=True, stable=True).indices
        residual = torch.cat([first[falling[min(AT_ONCE, surplus, len(second)) :]], second])
    return torch.cat([order[:important], residual])
