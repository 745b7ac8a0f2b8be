"""DART."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.backbones.attention import observe_input
from vitos.core.geometry import BoolArray
from vitos.eval.selectors.attention import FASTV_LAYER, language_attention, run_dense
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector

PIVOTS = 4


@selector(title="DART", rank=96)
def dart(task: Task, count: int) -> Choice:
    """DART (arXiv 2502.11494): a few pivots by the length of their keys, then the tokens least like each pivot.

    Keys are those of the first layer, the likeness is that of hidden states behind layer 2. The published code drops
    the tokens there; here they are dropped before the first layer.
    """

    def seen() -> tuple[Tensor, Tensor]:
        layers = task.policy.backbone.model.model.get_decoder().layers
        keys = language_attention(task, 1).keys.transpose(0, 1).flatten(1).double().cpu()
        if len(layers) <= FASTV_LAYER:
            raise ValueError(f"dart needs more than {FASTV_LAYER} layers, and {len(layers)} are there")
        hidden = observe_input(layers[FASTV_LAYER], lambda: run_dense(task))[0].double().cpu()
        return keys, hidden

    keys, hidden = task.once("dart", seen)
    total = task.grid.num_tokens
    is_visual = task.prompt.is_visual.cpu()
    first = is_visual.nonzero()[:total, 0]
    mask = unlike_pivots(hidden[first], keys[first], hidden[~is_visual], keys[~is_visual], count)
    return Choice(mask, fusion=NO_FUSION)


@selector(title="DART, in flight", rank=97, default=False)
def dart_in_flight(task: Task, count: int) -> Choice:
    """DART as published: the others leave behind layer 2, and the kept tokens have seen them there."""
    return Choice(dart(task, count).mask, after=FASTV_LAYER)


def unlike_pivots(tokens: Tensor, keys: Tensor, words: Tensor, word_keys: Tensor, count: int) -> BoolArray:
    """Mask of `count` visual tokens, shape (N,).

    Pivots are the four visual tokens and the four words with the longest keys (L1). Pivot by pivot, the visual tokens
    of the lowest cosine similarity to it are added, as many for each as fill the budget together.

    Args:
        tokens, words: hidden states, shapes (N, hidden) and (M, hidden).
        keys, word_keys: keys with the heads side by side, shapes (N, width) and (M, width).
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    own = keys.abs().sum(-1).topk(min(PIVOTS, count)).indices
    other = word_keys.abs().sum(-1).topk(min(PIVOTS, len(words))).indices
    pivots = torch.cat([unit[own], torch.nn.functional.normalize(words[other], dim=-1)])
    taken = torch.from_numpy(mask_of(own, len(tokens)))
    share = -(-(count - len(own)) // len(pivots))
    for pivot in pivots:
        number = min(share, count - int(taken.sum()))
        unlike = (unit @ pivot).masked_fill(taken, torch.inf)
        taken[unlike.topk(number, largest=False).indices] = True
    return taken.numpy()
