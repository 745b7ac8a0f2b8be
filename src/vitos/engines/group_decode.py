"""Completions of the same prompt, decoded side by side behind one copy of its keys and values.

A prompt's siblings are the queries of one row: at every step each reads the prompt and its own tokens, which a mask
says, so that no token can tell that it has siblings. The cache holds a prompt once instead of once per sibling
("bifurcated" attention, arXiv 2403.08845, by a mask instead of two matrix products). Queries that share a key head are
put side by side, too, so that keys need not be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitos.backbones.base import Backbone
from vitos.engines.kv_cache import GrowingLayer, caching
from vitos.engines.prefix import Prefilled

_NAME, _BASE = "vitos_siblings", "sdpa"
_PROMPT, _PADDING, _NOBODY = -1, -2, -3


@dataclass(slots=True)
class Siblings:
    """R completions of B prompts in B rows, S of them at most in one.

    Attributes:
        state: the rows; its `logits` are those of the completions, shape (R, vocab).
        columns: shape (B, S), number of the completion, counted through all rows, or `_NOBODY`.
        owner: shape (B, T), which completion's token a cached token is, or `_PROMPT`, or `_PADDING`.
        config: of the language model, which names the attention function in use.
    """

    state: Prefilled
    columns: Tensor
    owner: Tensor
    config: Any

    @property
    def cache(self) -> Any:
        return self.state.cache

    @property
    def logits(self) -> Tensor:
        return self.state.logits

    @staticmethod
    def can(backbone: Backbone, counts: Sequence[int]) -> bool:
        """Whether this is possible and any use: full attention by the library's SDPA function, and siblings."""
        implementation = backbone.model.config.get_text_config()._attn_implementation
        return max(counts) > 1 and not backbone.cache_refusal and implementation == _BASE

    @classmethod
    def of(cls, ready: Prefilled, counts: Sequence[int], backbone: Backbone) -> Siblings:
        """`counts[b]` completions behind row b."""
        numbers = torch.tensor(counts, device=ready.mask.device)
        places = torch.arange(max(counts), device=ready.mask.device)
        columns = (numbers.cumsum(0) - numbers)[:, None] + places
        columns = columns.masked_fill(places >= numbers[:, None], _NOBODY)
        owner = torch.where(ready.mask.bool(), _PROMPT, _PADDING)
        ready.logits = ready.logits.repeat_interleave(numbers, dim=0)
        return cls(ready, columns, owner, backbone.model.config.get_text_config())

    def advance(self, model: Any, token: Tensor) -> None:
        """Run one token (R,) of every completion."""
        held = self.columns != _NOBODY
        ids = torch.zeros_like(self.columns).masked_scatter(held, token)
        self.owner = torch.cat([self.owner, self.columns], dim=1)
        shared, own = self.owner == _PROMPT, self.owner[:, None] == self.columns[..., None]
        positions = self.state.next_positions[:, None].expand_as(ids)
        before = self.config._attn_implementation
        self.config._attn_implementation = _NAME
        try:
            out = model(
                input_ids=ids,
                attention_mask=(shared[:, None] | own)[:, None],
                position_ids=positions.expand(self.state.axes, -1, -1) if self.state.axes > 1 else positions,
                **caching(self.state.cache),
            )
        finally:
            self.config._attn_implementation = before
        self.state.logits = out.logits[held]
        self.state.next_positions = self.state.next_positions + 1

    def select(self, index: Tensor) -> Siblings:
        """The completions of `index` (R',), ascending; the cache is changed in place."""
        kept = torch.isin(self.columns, self.columns[self.columns != _NOBODY][index])
        rows = kept.any(1).nonzero()[:, 0]
        kept, columns, owner = kept[rows], self.columns[rows], self.owner[rows]
        width = int(kept.sum(1).max())
        order = (~kept).long().argsort(dim=1, stable=True)[:, :width]  # those that stay come first
        columns = columns.masked_fill(~kept, _NOBODY).gather(1, order)
        alive = (owner == _PROMPT) | torch.isin(owner, columns[columns != _NOBODY])
        tokens = alive.any(0).nonzero()[:, 0]
        state = Prefilled(
            self.state.logits[index],
            self.state.cache,
            self.state.mask[rows],
            self.state.next_positions[rows],
            self.state.axes,
        )
        for layer in state.cache.layers:
            if not isinstance(layer, GrowingLayer):
                raise TypeError(f"a cache of {type(layer).__name__} cannot leave tokens out")
            layer.batch_select_indices(rows)
            layer.keep_tokens(tokens)
        return Siblings(state, columns, owner[:, tokens], self.config)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """SDPA of queries (B, heads, S, size), those of all heads that share a key head as queries of that head."""
    rows, heads, siblings, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or options.get("softcap") is not None:
        return ALL_ATTENTION_FUNCTIONS[_BASE](module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * siblings, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=options.get("scaling"),
    )
    return out.reshape(rows, heads, siblings, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
