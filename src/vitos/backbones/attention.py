"""Attention weights of one layer of an unmodified model, for selectors that rank visual tokens by them.

The library's fast attention functions return no weights, and its slow one holds all of them. Here the layer is
watched through the library's own registry of attention functions: queries and keys of the one layer are taken, the
weights of the wanted queries computed from them, and the run ends there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "vitos_observed"
_BASE = "sdpa"
# Queries whose weights are held at once.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Attention:
    """What one layer's attention says of T tokens.

    Attributes:
        received: attention weight of every token, mean over heads and the asked queries, float32, shape (T,).
        keys: keys of every token, heads side by side, float32, shape (T, heads * dim).
    """

    received: Tensor
    keys: Tensor


class _Seen(Exception):
    """Ends the run at the watched layer."""


@torch.no_grad()
def observe_attention(owner: Any, layer: torch.nn.Module, run: Callable[[], object], query: int | None) -> Attention:
    """Run a model up to one attention layer and return what its tokens receive there.

    Args:
        owner: the (sub)model whose config names the attention function of `layer`.
        layer: the attention module.
        run: calls the model on a batch of one sequence.
        query: the asking token by index; None: the mean over all tokens.

    Raises:
        RuntimeError: if `run` does not come by `layer`, or the layer does not use the library's attention functions.
    """
    seen: list[Attention] = []

    def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if module is not layer:
            return ALL_ATTENTION_FUNCTIONS[_BASE](module, q, k, v, attention_mask, **options)
        scaling = options.get("scaling") or q.shape[-1] ** -0.5
        if attention_mask is None and getattr(module, "is_causal", False):  # left out where it is the plain triangle
            attention_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
        seen.append(_attention(q, k, attention_mask, float(scaling), query))
        raise _Seen

    config, before = owner.config, owner.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = watched
    # Registered for good: the library makes no mask for names that one instance alone knows.
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
    config._attn_implementation = _NAME
    try:
        run()
    except _Seen:
        pass
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_NAME]
    if not seen:
        raise RuntimeError(f"{type(layer).__name__} was not reached; its attention cannot be observed")
    return seen[0]


def _attention(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, query: int | None) -> Attention:
    """Of queries (1, heads, T, dim) and keys (1, key heads, T, dim)."""
    if len(q) != 1:
        raise ValueError(f"attention is observed on one sequence at a time, got {len(q)}")
    keys = k[0].float()
    per_head = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    total = q.shape[2]
    rows = torch.arange(total) if query is None else torch.arange(total)[[query]]
    received = torch.zeros(total, device=q.device)
    for part in rows.split(_CHUNK):
        weights = q[0][:, part].float() @ per_head.mT * scaling
        if mask is not None:
            allowed = mask[0][..., part, :total]
            weights = weights.masked_fill(~allowed, -torch.inf) if mask.dtype == torch.bool else weights + allowed
        received += weights.softmax(-1).mean(0).sum(0)
    return Attention(received / len(rows), keys.transpose(0, 1).flatten(1))
