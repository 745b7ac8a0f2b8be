"""Selectors that rank tokens by attention: of the text in an early layer, or of the vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.backbones.attention import Attention, observe_attention
from vitos.core.geometry import BoolArray
from vitos.core.prompt import pad_prompts
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, mask_of, mixed, selector

FASTV_LAYER = 2
# 10 of 64 tokens (20 of 128, 30 of 192) are contextual in the paper.
CONTEXTUAL_SHARE = 10 / 64


@selector(title="FastV", rank=70)
def fastv(task: Task, count: int) -> Choice:
    """FastV (arXiv 2403.06764): tokens that the prompt's last token attends to most in layer K = 2, mean over heads.

    The paper drops the others behind that layer and saves the work of the later layers. Here they are dropped before
    the first layer, so that every selector reasons from the same number of tokens; K layers run on all tokens first.
    """
    return Choice(highest(task.once("fastv", lambda: text_attention(task)), count), fusion=NO_FUSION)


@selector(title="VisionZip", needs=("encoder_attention",), rank=80)
def visionzip(task: Task, count: int) -> Choice:
    """VisionZip (arXiv 2412.04467): dominant tokens by encoder attention, the rest merged into contextual ones.

    Of the rest, tokens at regular intervals are targets. Each other token goes to the target with the most similar
    key, and a target becomes the mean of itself and what it got. The paper merges before the projector, this after it.
    """
    seen = task.once_per_scan("encoder_attention", lambda: _encoder_attention(task))
    mask, matrix = visionzip_merge(seen, count)
    return Choice(mask, visual=mixed(task.visual, mask, matrix), fusion=NO_FUSION)


def visionzip_merge(seen: Attention, count: int) -> tuple[BoolArray, Tensor]:
    """Kept tokens, bool (N,), and the weights (count, N) that mix all tokens into them."""
    total = len(seen.received)
    contextual = round(CONTEXTUAL_SHARE * count) if count > 1 else 0
    dominant = highest(seen.received, count - contextual)
    rest = torch.from_numpy(~dominant).nonzero()[:, 0]
    step = max(1, len(rest) // max(1, contextual))
    targets = rest[::step][:contextual]
    mask = dominant | mask_of(targets, total)
    kept = torch.from_numpy(mask).nonzero()[:, 0]
    matrix = torch.zeros(count, total)
    matrix[torch.arange(count), kept] = 1.0
    merged = rest[~torch.isin(rest, targets)]
    if len(targets) and len(merged):
        keys = torch.nn.functional.normalize(seen.keys.float(), dim=-1).cpu()
        owner = targets[(keys[merged] @ keys[targets].T).argmax(-1)]
        matrix[torch.searchsorted(kept, owner), merged] = 1.0
    return mask, matrix / matrix.sum(-1, keepdim=True)


def text_attention(task: Task) -> Tensor:
    """Attention from the last token of the dense prompt to every visual token in layer K, shape (N,).

    Raises:
        ValueError: if the language model has fewer layers, or no attention in that layer.
    """
    backbone = task.policy.backbone
    decoder = backbone.model.model.get_decoder()
    layer = getattr(decoder.layers[FASTV_LAYER - 1], "self_attn", None) if len(decoder.layers) >= FASTV_LAYER else None
    if layer is None:
        raise ValueError(f"fastv: layer {FASTV_LAYER} of {type(decoder).__name__} has no attention to rank tokens by")
    inputs = backbone.model_inputs(pad_prompts([task.prompt], backbone.pad_token_id))
    seen = observe_attention(decoder, layer, lambda: backbone.model(**inputs, use_cache=False), query=-1)
    return seen.received[task.prompt.is_visual]


def _encoder_attention(task: Task) -> Attention:
    seen = [task.policy.backbone.encoder_attention(open_image()) for open_image in (task.image, *task.others)]
    received, keys = (torch.cat([getattr(one, name).cpu() for one in seen]) for name in ("received", "keys"))
    return Attention(received, keys)
