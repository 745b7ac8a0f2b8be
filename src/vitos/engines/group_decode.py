"""Completions of the same prompt, decoded together behind one copy of its keys and values.

The completions of a prompt ("siblings") are the queries of one row: at every step each one reads the prompt and its
own tokens. A mask ensures that, so that no token is influenced by a sibling. The cache holds a prompt once instead of
once per sibling ("bifurcated" attention, arXiv 2403.08845, by a mask instead of two matrix products). Queries that
share a key head are put next to each other as well, so that keys need not be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitos.backbones.base import Backbone
from vitos.backbones.patching import patched
from vitos.engines.kv_cache import GrowingLayer, caching
from vitos.engines.prefix import Prefilled

_NAME, _BASE = "vitos_siblings", "sdpa"
# Values of `owner` and `columns` that are not the number of a completion.
_PROMPT, _PADDING, _EMPTY = -1, -2, -3


@dataclass(slots=True, kw_only=True)
class Siblings:
    """R completions of B prompts in B rows, at most S in each.

    Attributes:
        state: the rows; its `logits` are those of the completions, shape (R, vocab).
        columns: number of the completion in each column, counted through all rows, or `_EMPTY`, shape (B, S).
        owner: number of the completion that each cached token belongs to, or `_PROMPT` or `_PADDING`, shape (B, T).
        config: config of the language model, which names its attention function.
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
        """Whether the model has full attention in the library's SDPA function, and a prompt has siblings."""
        implementation = backbone.model.config.get_text_config()._attn_implementation
        return max(counts) > 1 and not backbone.cache_refusal and implementation == _BASE

    @classmethod
    def of(cls, ready: Prefilled, counts: Sequence[int], backbone: Backbone) -> Siblings:
        """Take over prefilled rows, for `counts[b]` completions of row b.

        The cache is not copied: `ready` must not be used afterwards.
        """
        numbers = torch.tensor(counts, device=ready.mask.device)
        places = torch.arange(max(counts), device=ready.mask.device)
        columns = (numbers.cumsum(0) - numbers)[:, None] + places  # (B, S)
        columns = columns.masked_fill(places >= numbers[:, None], _EMPTY)
        owner = torch.where(ready.mask.bool(), _PROMPT, _PADDING)  # (B, T)
        state = replace(ready, logits=ready.logits.repeat_interleave(numbers, dim=0))  # (R, vocab)
        return cls(state=state, columns=columns, owner=owner, config=backbone.model.config.get_text_config())

    def advance(self, model: Any, token: Tensor) -> None:
        """Run one token of every completion, shape (R,); the model attends with our function for this pass only."""
        held = self.columns != _EMPTY  # (B, S)
        ids = torch.zeros_like(self.columns).masked_scatter(held, token)  # (B, S)
        self.owner = torch.cat([self.owner, self.columns], dim=1)  # (B, T + S)
        shared, own = self.owner == _PROMPT, self.owner[:, None] == self.columns[..., None]  # (B, T), (B, S, T)
        positions = self.state.next_positions[:, None].expand_as(ids)
        with patched(self.config, "_attn_implementation", _NAME):
            out = model(
                input_ids=ids,
                attention_mask=(shared[:, None] | own)[:, None],  # (B, 1, S, T)
                position_ids=positions.expand(self.state.axes, -1, -1) if self.state.axes > 1 else positions,
                **caching(self.state.cache),
            )
        self.state.logits = out.logits[held]  # (R, vocab)
        self.state.next_positions = self.state.next_positions + 1

    def select(self, index: Tensor) -> Siblings:
        """Keep the completions of `index`, ascending, shape (R',).

        The cache is thinned in place and handed on: use the result, and not this object, afterwards.

        Raises:
            TypeError: for a cache whose tokens cannot be left out.
        """
        kept = torch.isin(self.columns, self.columns[self.columns != _EMPTY][index])  # (B, S)
        rows = kept.any(1).nonzero()[:, 0]
        kept, columns, owner = kept[rows], self.columns[rows], self.owner[rows]
        width = int(kept.sum(1).max())
        order = (~kept).long().argsort(dim=1, stable=True)[:, :width]  # the kept ones first
        columns = columns.masked_fill(~kept, _EMPTY).gather(1, order)
        alive = (owner == _PROMPT) | torch.isin(owner, columns[columns != _EMPTY])
        tokens = alive.any(0).nonzero()[:, 0]
        state = replace(
            self.state,
            logits=self.state.logits[index],
            mask=self.state.mask[rows],
            next_positions=self.state.next_positions[rows],
        )
        for layer in state.cache.layers:
            if not isinstance(layer, GrowingLayer):
                raise TypeError(f"a cache with layers of {type(layer).__name__} cannot leave tokens out")
            layer.batch_select_indices(rows)
            layer.keep_tokens(tokens)
        return Siblings(state=state, columns=columns, owner=owner[:, tokens], config=self.config)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """SDPA of queries (B, heads, S, size); heads that share a key head become more queries of that head."""
    rows, heads, siblings, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or options.get("softcap") is not None:
        return ALL_ATTENTION_FUNCTIONS[_BASE](module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * siblings, size),  # (B, key heads, groups * S, size)
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=options.get("scaling"),
    )
    return out.reshape(rows, heads, siblings, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
