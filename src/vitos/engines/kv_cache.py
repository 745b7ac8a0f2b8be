"""A KV cache with room to grow.

The library's `DynamicCache` copies all keys and values of every layer for every decoded token. Here each layer keeps
them in buffers with room for more, so that only the keys and values of the new token are written.
"""

from __future__ import annotations

import inspect
from functools import cache as remembered
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Room of a new buffer: at least this number of tokens, or this share of the tokens that it holds.
ROOM, SHARE = 32, 0.25


@remembered
def _argument() -> str:
    """The name of a model's cache argument: transformers renamed it in version 5 and drops the old name in 5.40."""
    from transformers import LlamaForCausalLM  # imported here, not above: it loads the model's code

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def caching(cache: Any) -> dict[str, Any]:
    """Arguments for a forward pass of a model that reads the cache and adds to it."""
    return {_argument(): cache, "use_cache": True}


class GrowingLayer(DynamicLayer):
    """The library's layer, with `keys` and `values` as views of larger buffers.

    For inference only: `update` writes in place, so no gradient passes through it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        if length == 0:  # no room yet: the prompt may be all that is ever run
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
        """Keep only the tokens of `index`, shape (T,), in every row."""
        self.keys, self.values = self.keys.index_select(-2, index), self.values.index_select(-2, index)
        self._buffers = None


def growing_cache(config: Any, *, whole: bool = False) -> DynamicCache:
    """An empty cache for a model with this text config.

    Sliding-window layers remain the library's, unless `whole` asks that they hold every token of a prompt.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if whole or type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _moved(tensor: Tensor, length: int) -> Tensor:
    """A buffer for `length` tokens that begins with those of `tensor` (B, heads, T, size)."""
    buffer = tensor.new_empty(*tensor.shape[:2], length, tensor.shape[-1])
    buffer[..., : tensor.shape[-2], :] = tensor
    return buffer
