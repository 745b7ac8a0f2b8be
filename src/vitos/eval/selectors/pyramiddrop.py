"""PyramidDrop."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vitos.core.geometry import BoolArray
from vitos.eval.selectors.attention import text_attention
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, selector

STAGES = 4


@selector(title="PyramidDrop", rank=74)
def pyramiddrop(task: Task, count: int) -> Choice:
    """PyramidDrop (arXiv 2410.17247): at 1/4, 1/2 and 3/4 of the layers the same share of the tokens is dropped.

    Each time those that the prompt's last token attends to most are kept, mean over heads. The authors' code drops
    them in flight, so each later stage is computed from fewer tokens. Here the attention of all stages comes from the
    dense prompt, and `count` is what is left at the end: every selector reasons from the same number of tokens.
    """
    layers = len(task.policy.backbone.model.model.get_decoder().layers)
    depths = [max(1, layers * stage // STAGES) for stage in range(1, STAGES)]
    stages = task.once("pyramiddrop", lambda: [text_attention(task, depth) for depth in depths])
    return Choice(staged(stages, count), fusion=NO_FUSION)


def staged(stages: list[Tensor], count: int) -> BoolArray:
    """Mask of the tokens that survive each stage's ranking (N,); the numbers fall by a constant factor to `count`."""
    total = len(stages[0])
    kept = np.arange(total)
    for stage, scores in enumerate(stages, 1):
        number = max(count, round(total * (count / total) ** (stage / len(stages))))
        kept = kept[highest(scores[kept], number)]
    mask = np.zeros(total, dtype=bool)
    mask[kept] = True
    return mask
