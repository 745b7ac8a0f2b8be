"""PruMerge+."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitos.core.geometry import BoolArray
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, mixed, selector

NEIGHBOURS = 32
SALIENT_SHARE = 1 / 4


@selector(title="PruMerge+", needs=("encoder_attention",), rank=82)
def prumerge_plus(task: Task, count: int) -> Choice:
    """PruMerge+ (arXiv 2403.15388): attention outliers and evenly spaced tokens, each with its neighbours added to it.

    The authors' count is that of the outliers, about four times as many with the spaced ones. At a budget a quarter is
    chosen by attention and the rest is spaced evenly. Their code merges before the projector, by the last layer's
    keys; here it is behind the projector, by the keys of the layer whose output is used.
    """
    seen = task.attention
    mask, matrix = summed_merge(seen.keys.transpose(0, 1).flatten(1), seen.joint, spaced(seen.joint, count - 1))
    return Choice(mask, visual=mixed(task.visual, mask, matrix), fusion=NO_FUSION)


def spaced(attention: Tensor, count: int) -> Tensor:
    """`count` tokens of N: a quarter by falling attention, then evenly spaced ones of the others; indices."""
    salient = torch.sort(attention, descending=True, stable=True).indices[: round(SALIENT_SHARE * count)]
    rest = np.setdiff1d(np.arange(len(attention)), salient.numpy())
    places = np.linspace(0, len(rest) - 1, count - len(salient)).round().astype(int)
    return torch.cat([salient, torch.from_numpy(rest[places])])


def outliers(attention: Tensor) -> Tensor:
    """Tokens with attention above Q3 + 1.5 · IQR, by falling attention: PruMerge's own count; indices."""
    low, high = np.percentile(attention.numpy(), [25, 75])
    count = int((attention > high + 1.5 * (high - low)).sum())
    return torch.sort(attention, descending=True, stable=True).indices[:count]


def outliers_and_steps(attention: Tensor) -> Tensor:
    """PruMerge+'s own count: outliers, then every s-th token, s a third of the number of tokens per outlier; indices.

    Raises:
        ValueError: if there are no outliers, or more than a third of the tokens.
    """
    salient = outliers(attention)
    step = int(int(1 / (len(salient) / len(attention))) / 3) if len(salient) else 0
    if step == 0:
        raise ValueError(f"{len(salient)} of {len(attention)} tokens are outliers; PruMerge+ has no spacing for that")
    steps = torch.arange(0, len(attention) - 1, step)
    return torch.cat([salient, steps[~torch.isin(steps, salient)]])


def summed_merge(keys: Tensor, attention: Tensor, chosen: Tensor) -> tuple[BoolArray, Tensor]:
    """Kept tokens, bool (N,), and the weights (n + 1, N) that mix all tokens into them.

    Each chosen token gets the attention-weighted **sum** of its 32 nearest by key, which is not normalised. One more
    row is the weighted sum of all tokens that were not chosen; it takes the place of the last of them.

    Args:
        keys: keys with the heads side by side, shape (N, width).
        attention: attention with the heads as one (`Attention.joint`), shape (N,).
        chosen: indices of the n chosen tokens, fewer than N.
    """
    total = len(keys)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    likeness = (unit[chosen] @ unit.T).scatter(1, chosen[:, None], -torch.inf)
    near = likeness.topk(min(NEIGHBOURS, total - 1)).indices  # (n, 32)
    matrix = torch.zeros(total, total)
    matrix[chosen] = torch.zeros(len(chosen), total).scatter(1, near, attention.float()[near])
    matrix[chosen, chosen] = 1.0
    dropped = torch.from_numpy(~mask_of(chosen, total)).nonzero()[:, 0]
    matrix[dropped[-1], dropped] = attention.float()[dropped]
    mask = mask_of(torch.cat([chosen, dropped[-1:]]), total)
    return mask, matrix[torch.from_numpy(mask)]
