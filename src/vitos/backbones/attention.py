"""Attention weights of one layer of an unmodified model, for selectors that rank visual tokens by them.

The library's fast attention functions return no weights, and its slow one returns the weights of every layer. Here one
layer is observed through the library's own registry of attention functions: a function under our name takes that
layer's queries and keys, computes the weights of the queries that are asked for, and ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        keys: key vectors of each token by head, float32, shape (heads, T, dim).
        joint: attention weight as if all heads, side by side, were a single one; mean over queries, shape (T,).
    """

    received: Tensor
    keys: Tensor
    joint: Tensor

    def tokens(self, index: Tensor | slice) -> Attention:
        """The same for some of the tokens; the weights are not scaled to sum to 1."""
        return Attention(self.received[index], self.keys[:, index], self.joint[index])

    def merged(self, size: int) -> Attention:
        """Each `size` neighbours as one token: the sum of their weights, the mean of their keys."""
        keys = self.keys.unflatten(1, (-1, size)).mean(2)
        return Attention(self.received.view(-1, size).sum(1), keys, self.joint.view(-1, size).sum(1))

    def cpu(self) -> Attention:
        """The same in main memory."""
        return Attention(self.received.cpu(), self.keys.cpu(), self.joint.cpu())


class _Seen(Exception):
    """Ends the run at the observed layer."""


@torch.no_grad()
def observe_attention(
    owner: Any, layer: torch.nn.Module, run: Callable[[], object], query: int | Sequence[int] | None
) -> Attention:
    """Run a model up to one attention layer and return what its tokens receive there.

    Args:
        owner: the model, or the part of it, whose config names the attention function of `layer`.
        layer: the attention module.
        run: a function that calls the model on a batch of one sequence.
        query: index of the token whose attention is wanted, or several for the mean over them; None for all tokens.

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


def _attention(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, query: int | Sequence[int] | None
) -> Attention:
    """Attention from queries (1, heads, T, dim) and keys (1, key heads, T, dim)."""
    if len(q) != 1:
        raise ValueError(f"attention is observed on one sequence at a time, got a batch of {len(q)}")
    keys = k[0].float()  # (key heads, T, dim)
    per_head = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # (heads, T, dim)
    total, heads = q.shape[2], q.shape[1]
    wanted = [query] if isinstance(query, int) else query
    rows = torch.arange(total) if wanted is None else torch.arange(total)[list(wanted)]
    received, joint = torch.zeros(2, total, device=q.device)
    for part in rows.split(_CHUNK):
        logits = q[0][:, part].float() @ per_head.mT * scaling  # (heads, chunk, T)
        side_by_side = logits.sum(0) / heads**0.5  # one head of heads * dim: its scale is smaller by this factor
        if mask is not None:
            allowed = mask[0][..., part, :total]
            logits, side_by_side = _masked(logits, allowed), _masked(side_by_side, allowed[0])
        received += logits.softmax(-1).mean(0).sum(0)
        joint += side_by_side.softmax(-1).sum(0)
    return Attention(received / len(rows), keys, joint / len(rows))


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    return logits.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else logits + allowed


@torch.no_grad()
def observe_input(module: torch.nn.Module, run: Callable[[], object]) -> Tensor:
    """The first input of a module while `run` calls the model on one sequence; the run ends there.

    Raises:
        RuntimeError: if `run` does not reach `module`.
    """
    seen: list[Tensor] = []

    def observed(_: torch.nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else options["hidden_states"])
        raise _Seen

    hook = module.register_forward_pre_hook(observed, with_kwargs=True)
    try:
        with suppress(_Seen):
            run()
    finally:
        hook.remove()
    if not seen:
        raise RuntimeError(f"{type(module).__name__} was not reached; its input cannot be observed")
    return seen[0]


# The mask for our name is registered once: the library looks for masks among the names that all models share, and
# finds none for a name that only one instance of its registry has.
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
