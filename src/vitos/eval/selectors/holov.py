"""HoloV."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector

FIXED_CROPS = 16
DIVERSITY = 0.09


@selector(title="HoloV", needs=("encoder_attention",), rank=84)
def holov(task: Task, count: int) -> Choice:
    """HoloV (arXiv 2510.02912): each crop of the image has a share of the budget, by its attention and variety.

    As in the authors' code a crop is a run of consecutive tokens: 16 of them where the encoder has one resolution
    (LLaVA), else about 1.8 · N / count (Qwen). Where their shares do not fill the budget the code adds zero rows; here
    the most attended tokens do.
    """
    total = task.grid.num_tokens
    any_size = task.policy.backbone.capabilities.any_resolution
    crops = max(1, int(1024 / 576 * total / count)) if any_size else FIXED_CROPS
    attention = task.attention.received
    chosen = crop_wise(task.tokens, attention, count, crops)
    if missing := count - len(chosen):
        left = attention.index_fill(0, chosen, -torch.inf)
        chosen = torch.cat([chosen, left.topk(missing).indices])
    return Choice(mask_of(chosen, total), fusion=NO_FUSION)


def crop_wise(tokens: Tensor, attention: Tensor, count: int, crops: int) -> Tensor:
    """At most `count` tokens of (N, hidden), crop by crop, in each by falling attention (N,); indices."""
    parts = [part for part in torch.arange(len(tokens)).tensor_split(crops) if len(part)]
    scores = torch.stack([_crop_score(tokens[part], attention[part]) for part in parts])
    weights = scores / (scores.sum() + 1e-6)
    shares = (weights * count).floor().long()
    remaining = int(count - shares.sum())
    if remaining > 0:
        shares[weights.topk(min(remaining, len(weights))).indices] += 1
    chosen = [
        part if share >= len(part) else part[attention[part].topk(share).indices]
        for part, share in zip(parts, shares.tolist(), strict=True)
    ]
    return torch.cat(chosen)[:count]


def _crop_score(tokens: Tensor, attention: Tensor) -> Tensor:
    """Mean attention, and a little of the variance of each token's similarities, brought to the same scale."""
    others = len(tokens) - 1
    if others == 0:
        return attention.mean()
    unit = tokens / (tokens.norm(dim=1, keepdim=True) + 1e-6)
    similar = (unit @ unit.T).fill_diagonal_(0)
    mean = similar.sum(1) / others
    variance = ((similar - mean[:, None]) ** 2).sum(1) / others
    scaled = attention * 1e3
    scores: Tensor = scaled + DIVERSITY * variance * scaled.abs().mean() / (variance.abs().mean() + 1e-6)
    return scores.mean()
