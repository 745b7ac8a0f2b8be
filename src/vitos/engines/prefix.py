"""Keys and values of prompts that have run: kept per prompt, reduced to some of their tokens, joined into a batch.

All tokens up to a prompt's last visual token are its *prefix*: system text and image. Questions about one image share
it, and after localization its entries for the kept visual tokens are all that reasoning needs (the `gather` plan). An
entry is rotated to its token's position when it is written, so it remains a valid key wherever it is put.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitos.core.prompt import Prompt
from vitos.engines.kv_cache import caching, growing_cache


@dataclass(frozen=True, slots=True)
class Prefix:
    """The keys and values of a prompt's head, every visual token included.

    Attributes:
        head: the tokens that ran.
        layers: keys and values of each layer that ran, each of shape (heads, T, size of a head).
        model: the model that computed them; its weights must not have changed since.
        states: hidden states after the last of these layers, shape (T, hidden), if only the first layers ran (plan
            `one_pass`); None if all did.
    """

    head: Prompt
    layers: tuple[tuple[Tensor, Tensor], ...]
    model: Any
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.head)

    @property
    def nbytes(self) -> int:
        states = 0 if self.states is None else self.states.nbytes
        return states + sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def left(self, prompt: Prompt) -> int:
        """Number of tokens of a prompt that run behind this prefix: the kept ones, if all have run so far."""
        return (
            prompt.cached_length if self.states is not None and len(self) == len(prompt) else len(prompt) - len(self)
        )

    def covers(self, prompt: Prompt, model: Any) -> bool:
        """Whether this is the prefix of `prompt`, with the same image at the same positions, under this model.

        If only the first layers ran, the prompt must drop its tokens behind them, and may have run as a whole.
        """
        length = len(self)
        lengths = (prompt.prefix_length,) if self.states is None else (prompt.prefix_length, len(prompt))
        return (
            self.model is model
            and prompt.after == (None if self.states is None else len(self.layers))
            and length in lengths
            and torch.equal(prompt.input_ids[:length], self.head.input_ids)
            and torch.equal(prompt.position_ids[:, :length], self.head.position_ids)
            and torch.equal(prompt.embeddings, self.head.embeddings)
        )


@dataclass(slots=True)
class Prefilled:
    """B sequences that have run.

    Attributes:
        logits: logits after the last token, shape (B, vocab).
        cache: keys and values of all layers.
        mask: attention mask, 0 on padding, shape (B, T).
        next_positions: position of the next token, on every axis, shape (B,).
        axes: number of axes of the positions.
    """

    logits: Tensor
    cache: Any
    mask: Tensor
    next_positions: Tensor
    axes: int

    def expand(self, counts: Sequence[int]) -> Prefilled:
        """Repeat row b `counts[b]` times; like `select`, it consumes this object."""
        return self.select(torch.repeat_interleave(torch.tensor(counts)).to(self.mask.device))

    def advance(self, model: Any, token: Tensor) -> None:
        """Run one token of every row, shape (B,), in place."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = self.next_positions[:, None]
        out = model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=positions.expand(self.axes, -1, -1) if self.axes > 1 else positions,
            **caching(self.cache),
        )
        self.logits = out.logits[:, -1]
        self.next_positions = self.next_positions + 1

    def select(self, index: Tensor) -> Prefilled:
        """The rows of `index`, shape (R,), in that order and repeated as often as they occur there.

        The cache is changed in place and handed on: use the result, and not this object, afterwards.
        """
        self.cache.batch_select_indices(index)
        return replace(
            self, logits=self.logits[index], mask=self.mask[index], next_positions=self.next_positions[index]
        )


def join(prefixes: Sequence[Prefix], hidden: Sequence[Tensor | None], config: Any) -> tuple[Any, Tensor]:
    """Copy several prefixes into one cache, padded on the left.

    Args:
        prefixes: B prefixes of the same model.
        hidden: the tokens of each prefix to leave out, bool, shape (T,) or longer; None to keep all.
        config: text config of the model.

    Returns:
        The cache and its attention mask (B, T).
    """
    device = prefixes[0].head.input_ids.device
    kept = [
        torch.arange(len(p), device=device) if h is None else (~h[: len(p)]).nonzero()[:, 0]
        for p, h in zip(prefixes, hidden, strict=True)
    ]
    width = max(map(len, kept))
    mask = torch.stack([torch.arange(width, device=device) >= width - len(k) for k in kept]).long()
    cache = growing_cache(config)
    for index, layers in enumerate(zip(*(p.layers for p in prefixes), strict=True)):
        keys, values = (padded([layer[part] for layer in layers], kept, width) for part in (0, 1))
        cache.update(keys, values, index)
    return cache, mask


def cache_bytes(cache: Any) -> int:
    """Size of a cache's keys and values in bytes."""
    return sum(int(layer.keys.nbytes) + int(layer.values.nbytes) for layer in cache.layers)


def padded(entries: Sequence[Tensor], kept: Sequence[Tensor], width: int) -> Tensor:
    """The tokens `kept` of entries (heads, T, size), with zeros before them, shape (B, heads, width, size)."""
    heads, _, size = entries[0].shape
    out = entries[0].new_zeros(len(entries), heads, width, size)
    for row, (entry, index) in enumerate(zip(entries, kept, strict=True)):
        out[row, :, width - len(index) :] = entry.index_select(1, index)
    return out
