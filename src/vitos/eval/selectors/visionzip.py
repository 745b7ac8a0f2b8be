"""VisionZip."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.backbones.attention import Attention
from vitos.core.geometry import BoolArray
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, mask_of, mixed, selector

# 10 of 64 tokens (20 of 128, 30 of 192) are contextual in the paper.
CONTEXTUAL_SHARE = 10 / 64


@selector(title="VisionZip", needs=("encoder_attention",), rank=80)
def visionzip(task: Task, count: int) -> Choice:
    """VisionZip (arXiv 2412.04467): dominant tokens by encoder attention, the rest merged into contextual ones.

    The authors' code merges before the projector, and on CLIP it also passes on the CLS token, which the encoders here
    do not give. Both are left out.
    """
    mask, matrix = visionzip_merge(task.attention, count)
    return Choice(mask, visual=mixed(task.visual, mask, matrix), fusion=NO_FUSION)


@selector(title="VisionZip, mean", needs=("encoder_attention",), rank=81, default=False)
def visionzip_mean(task: Task, count: int) -> Choice:
    """VisionZip with contextual tokens that are the mean of target and members, so that they keep their length.

    AngelSlim merges like this. It suits a merge behind the projector better than the authors' sum.
    """
    mask, matrix = visionzip_merge(task.attention, count)
    return Choice(mask, visual=mixed(task.visual, mask, equal_weights(matrix)), fusion=NO_FUSION)


def visionzip_merge(seen: Attention, count: int) -> tuple[BoolArray, Tensor]:
    """Kept tokens, bool (N,), and the weights (count, N) that mix all tokens into them.

    The dominant tokens have the highest attention. Of the rest, tokens at regular intervals are targets. Each other
    token goes to the target with the most similar key (mean over heads). A target becomes **itself plus the mean of
    what it got**, as in the authors' code.
    """
    total = len(seen.received)
    contextual = round(CONTEXTUAL_SHARE * count) if count > 1 else 0
    dominant = highest(seen.received, count - contextual)
    rest = torch.from_numpy(~dominant).nonzero()[:, 0]
    step = max(1, len(rest) // max(1, contextual))
    targets = rest[::step][:contextual]
    mask = dominant | mask_of(targets, total)
    kept = torch.from_numpy(mask).nonzero()[:, 0]
    matrix = torch.zeros(count, total)
    merged = rest[~torch.isin(rest, targets)]
    if len(targets) and len(merged):
        keys = torch.nn.functional.normalize(seen.keys.double().mean(0), dim=-1)
        owner = targets[(keys[merged] @ keys[targets].T).argmax(-1)]
        matrix[torch.searchsorted(kept, owner), merged] = 1.0
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1)
    matrix[torch.arange(count), kept] = 1.0
    return mask, matrix


def equal_weights(matrix: Tensor) -> Tensor:
    """The mean of all tokens that take part in a row of weights."""
    parts = (matrix > 0).float()
    return parts / parts.sum(-1, keepdim=True)
