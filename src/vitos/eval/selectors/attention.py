"""FastV, and what selectors see of the language model: attention, keys and hidden states of its early layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vitos.backbones.attention import Attention, observe_attention
from vitos.core.prompt import pad_prompts
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, selector

FASTV_LAYER = 2


@selector(title="FastV", rank=70)
def fastv(task: Task, count: int) -> Choice:
    """FastV (arXiv 2403.06764): tokens that the prompt's last token attends to most in layer K = 2, mean over heads.

    The paper drops the others behind that layer and saves the work of the later layers. Here they are dropped before
    the first layer, so that every selector reasons from the same number of tokens; K layers run on all tokens first.
    """
    return Choice(highest(task.once("fastv", lambda: text_attention(task)), count), fusion=NO_FUSION)


@selector(title="FastV, in flight", rank=71, default=False)
def fastv_in_flight(task: Task, count: int) -> Choice:
    """FastV as published: the others leave behind layer 2, and the kept tokens have seen them there."""
    return Choice(fastv(task, count).mask, after=FASTV_LAYER)


def text_attention(task: Task, layer: int = FASTV_LAYER, query: int | Sequence[int] = -1) -> Tensor:
    """Attention from tokens of the dense prompt, by default the last, to those of the first image, shape (N,)."""
    return of_image(task, language_attention(task, layer, query).received)


def language_attention(task: Task, layer: int, query: int | Sequence[int] = -1) -> Attention:
    """Attention over the dense prompt in a layer of the language model, the first of which is 1.

    Raises:
        ValueError: if the language model has fewer layers, or no attention in that layer.
    """
    backbone = task.policy.backbone
    decoder = backbone.model.model.get_decoder()
    module = getattr(decoder.layers[layer - 1], "self_attn", None) if len(decoder.layers) >= layer else None
    if module is None:
        raise ValueError(f"layer {layer} of {type(decoder).__name__} has no attention to choose tokens by")
    return observe_attention(decoder, module, lambda: run_dense(task), query)


def run_dense(task: Task) -> object:
    """A pass of the model over the dense prompt."""
    backbone = task.policy.backbone
    inputs = backbone.model_inputs(pad_prompts([task.prompt], backbone.pad_token_id))
    return backbone.model(**inputs, use_cache=False)


def of_image(task: Task, values: Tensor) -> Tensor:
    """The entries (T, ...) of a prompt's tokens that are visual, shape (N, ...)."""
    return values[task.prompt.is_visual.to(values.device)].cpu()
