"""A KV cache with room to grow.

The library's `DynamicCache` copies all keys and values of every layer for every decoded token. Here each layer keeps
them in buffers with room for more, so that a token costs its own keys and values only.
"""

from __future__ import annotations

import inspect
from functools import cache as remembered
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens of room when a buffer is made, at least; and its share of the tokens that are there.
ROOM, SHARE = 32, 0.25


@remembered
def _argument() -> str:
    """What models call it: transformers renamed it within version 5, and drops the old name in 5.40."""
    from transformers import LlamaForCausalLM  # loads the model's code, which is no work for an import

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def caching(cache: Any) -> dict[str, Any]:
    """Arguments of a model's forward pass that reads the cache and adds to it."""
    return {_argument(): cache, "use_cache": True}


class GrowingLayer(DynamicLayer):
    """Keys and values as the library's layer has them, of which `keys` and `values` are views of larger buffers.

    For inference: `update` writes in place, so no gradient goes through it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        if length == 0:  # a prompt that may never go on: no room
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            room = end + max(ROOM, int(SHARE * end))
            self._buffers = (_moved(self.keys, room), _moved(self.values, room))
        keys, values = self._buffers
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def keep_tokens(self, index: Tensor) -> None:
        """Only the tokens of `index` (T,), in every row."""
        self.keys, self.values = self.keys.index_select(-2, index), self.values.index_select(-2, index)
        self._buffers = None


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this text config; layers of limited attention stay the library's."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _moved(tensor: Tensor, length: int) -> Tensor:
    """The tokens of `tensor` (B, heads, T, size) at the start of a buffer for `length` tokens."""
    buffer = tensor.new_empty(*tensor.shape[:2], length, tensor.shape[-1])
    buffer[..., : tensor.shape[-2], :] = tensor
    return buffer
