"""Attention weights of one layer of an unmodified model, for selectors that rank visual tokens by them.

The library's fast attention functions return no weights, and its slow one returns the weights of every layer. Here one
layer is observed through the library's own registry of attention functions: a function under our name takes that
layer's queries and keys, computes the weights of the queries that are asked for, and ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitos.backbones.patching import patched

_NAME = "vitos_observed"
_BASE = "sdpa"
# Number of queries whose weights are in memory at once.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer over T tokens.

    Attributes:
        received: attention weight that each token receives, mean over heads and queries, float32, shape (T,).
        keys: key vectors of each token, heads side by side, float32, shape (T, heads * dim).
    """

    received: Tensor
    keys: Tensor


class _Seen(Exception):
    """Ends the run at the observed layer."""


@torch.no_grad()
def observe_attention(owner: Any, layer: torch.nn.Module, run: Callable[[], object], query: int | None) -> Attention:
    """Run a model up to one attention layer and return what its tokens receive there.

    Args:
        owner: the model, or the part of it, whose config names the attention function of `layer`.
        layer: the attention module.
        run: a function that calls the model on a batch of one sequence.
        query: index of the token whose attention is wanted; None for the mean over all tokens.

    Raises:
        RuntimeError: if `run` does not reach `layer`, or the layer does not use the library's attention functions.
    """
    seen: list[Attention] = []

    def observed(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if module is not layer:
            return ALL_ATTENTION_FUNCTIONS[_BASE](module, q, k, v, attention_mask, **options)
        scaling = options.get("scaling") or q.shape[-1] ** -0.5
        if attention_mask is None and getattr(module, "is_causal", False):  # a plain triangle is not passed as a mask
            attention_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
        seen.append(_attention(q, k, attention_mask, float(scaling), query))
        raise _Seen

    with _attending_with(owner.config, observed), suppress(_Seen):
        run()
    if not seen:
        raise RuntimeError(f"{type(layer).__name__} was not reached; its attention cannot be observed")
    return seen[0]


@contextmanager
def _attending_with(config: Any, function: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, the model with this config calls `function` for attention; restored if the block raises.

    The name is registered with the library for this time only, so one model at a time can be observed.
    """
    ALL_ATTENTION_FUNCTIONS[_NAME] = function
    try:
        with patched(config, "_attn_implementation", _NAME):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _attention(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, query: int | None) -> Attention:
    """Attention from queries (1, heads, T, dim) and keys (1, key heads, T, dim)."""
    if len(q) != 1:
        raise ValueError(f"attention is observed on one sequence at a time, got a batch of {len(q)}")
    keys = k[0].float()  # (key heads, T, dim)
    per_head = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # (heads, T, dim)
    total = q.shape[2]
    rows = torch.arange(total) if query is None else torch.arange(total)[[query]]
    received = torch.zeros(total, device=q.device)
    for part in rows.split(_CHUNK):
        weights = q[0][:, part].float() @ per_head.mT * scaling  # (heads, chunk, T)
        if mask is not None:
            allowed = mask[0][..., part, :total]
            weights = weights.masked_fill(~allowed, -torch.inf) if mask.dtype == torch.bool else weights + allowed
        received += weights.softmax(-1).mean(0).sum(0)
    return Attention(received / len(rows), keys.transpose(0, 1).flatten(1))


# The mask for our name is registered once: the library looks for masks among the names that all models share, and
# finds none for a name that only one instance of its registry has.
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
