"""HiPrune."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.core.geometry import BoolArray
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector

ALPHA = 0.1
OBJECT_DEPTH = 0.4  # layer 10 of the 23 that LLaVA-1.5 uses; the second of Qwen2.5-VL's four whole-image blocks


@selector(title="HiPrune", needs=("encoder_attention",), rank=88)
def hiprune(task: Task, count: int) -> Choice:
    """HiPrune (arXiv 2508.00553): anchors of a middle layer with their neighbours, the rest by a late layer."""
    middle = task.once_per_scan(
        "hiprune", lambda: task.policy.backbone.encoder_attention(task.image(), OBJECT_DEPTH).received.cpu()
    )
    (view,) = task.grid.views[:1]
    return Choice(anchored(middle, task.attention.received, count, view.cols), fusion=NO_FUSION)


def anchored(middle: Tensor, late: Tensor, count: int, cols: int, alpha: float = ALPHA, least: int = 0) -> BoolArray:
    """Mask of `count` tokens, shape (N,).

    round(alpha · count / 5) anchors have the highest attention in the middle layer (N,). Each brings its four
    neighbours by index, which wrap at the sides of the grid, as in the authors' code.

    Args:
        cols: width of the grid.
        least: smallest number of anchors where the budget has room for one with its neighbours; 1 in AngelSlim, 0 in
            the authors' code.
    """
    anchors = min(max(least, round(alpha * count / 5)), count // 5)
    places = middle.topk(anchors).indices
    cross = torch.cat([places + step for step in (0, -1, 1, -cols, cols)]).clamp(0, len(middle) - 1).unique()
    rest = late.index_fill(0, cross, -torch.inf).topk(count - len(cross)).indices
    return mask_of(torch.cat([cross, rest]), len(middle))
