"""Decoding that sequences can join and leave at any token (continuous batching), for a server.

`TorchEngine.sample` decodes a set of prompts together until the last has ended; a question that arrives a moment
later would wait for all of them. Here a prompt runs when it arrives, and its row joins those that are being written.
Decoding is greedy, so the text of a row is that of `sample`, up to floating-point differences between batch shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from vitos.core.prompt import Prompt
from vitos.engines.base import Completion, Pieces, Sampling
from vitos.engines.kv_cache import growing_cache
from vitos.engines.prefix import Prefilled, Prefix
from vitos.engines.torch_engine import TorchEngine, check_finite


@dataclass(slots=True, kw_only=True)
class RunningRow:
    """A completion that is being written.

    Attributes:
        key: number by which the caller knows it.
        sampling: its limits and stop strings.
        ids: the tokens so far.
        logprobs: their log-probabilities.
        pieces: what of its text has been returned.
    """

    key: int
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: Pieces = field(default_factory=Pieces)


@dataclass(frozen=True, slots=True)
class Written:
    """What one step wrote for one row.

    Attributes:
        key: number by which the caller knows the row.
        text: new text, often empty.
        completion: the whole completion if it has ended, else None.
    """

    key: int
    text: str
    completion: Completion | None


class RunningBatch:
    """Rows that are decoded together.

    Args:
        engine: the engine whose model runs; its `max_batch_tokens` limits rows times the longest row.

    A family whose cache does not hold every token (sliding windows) is decoded one row at a time.
    """

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._rows: list[RunningRow] = []
        self._state: Prefilled | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def fits(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether there is room for one more row, as there always is in an empty batch."""
        if self._state is None:
            return True
        if self._engine.backbone.cache_refusal:
            return False
        left = max(row.sampling.max_tokens - len(row.ids) for row in self._rows)
        width = max(prompt.cached_length + sampling.max_tokens, self._state.mask.shape[1] + left)
        return (len(self) + 1) * width <= self._engine.max_batch_tokens

    @torch.no_grad()
    def join(self, key: int, prompt: Prompt, sampling: Sampling, prefix: Prefix | None = None) -> None:
        """Run a prompt and add its row to the others; its text is returned under `key`.

        Raises:
            ValueError: if the sampling is not greedy, or prompt and answer are longer than the model's context.
        """
        if sampling.temperature > 0:
            raise ValueError("a running batch is greedy; temperature must be 0")
        self._engine.backbone.check_room(max(len(prompt), prompt.next_position), sampling.max_tokens)
        ready = self._engine.prefill([prompt], [prefix])
        config = self._engine.backbone.model.config.get_text_config()
        self._state = ready if self._state is None else _together(self._state, ready, config)
        self._rows.append(RunningRow(key=key, sampling=sampling))

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Write one token of every row; rows that have ended leave the batch.

        Raises:
            ValueError: if the logits are not finite.
        """
        if self._state is None:
            return []
        best = self._engine.log_softmax(self._state.logits, 0.0).max(-1)
        check_finite(best.values)
        tokens, scores = best.indices.tolist(), best.values.tolist()
        for row, token, score in zip(self._rows, tokens, scores, strict=True):
            row.ids.append(token)
            row.logprobs.append(score)
        texts = self._engine.texts([row.ids for row in self._rows])
        written = [self._write(row, text) for row, text in zip(self._rows, texts, strict=True)]
        running = [i for i, w in enumerate(written) if w.completion is None]
        token = best.indices
        if len(running) < len(self._rows):
            self._keep(running)
            token = token[torch.tensor(running, dtype=torch.long, device=token.device)]
        if self._state is not None:
            self._state.advance(self._engine.model, token)
        return written

    def drop(self, keys: Collection[int]) -> None:
        """Drop rows before they have ended."""
        self._keep([i for i, row in enumerate(self._rows) if row.key not in keys])

    def clear(self) -> None:
        """Drop all rows."""
        self._rows, self._state = [], None

    def _write(self, row: RunningRow, text: str) -> Written:
        stopped = row.ids[-1] in self._engine.backbone.stop_token_ids or any(s in text for s in row.sampling.stop)
        if not stopped and len(row.ids) < row.sampling.max_tokens:
            return Written(row.key, row.pieces.next(text), None)
        completion = Completion(torch.tensor(row.ids), torch.tensor(row.logprobs), text, stopped)
        return Written(row.key, row.pieces.rest(text), completion)

    def _keep(self, index: Sequence[int]) -> None:
        if not index:
            self.clear()
        elif self._state is not None and len(index) < len(self._rows):
            self._rows = [self._rows[i] for i in index]
            self._state = self._state.select(torch.tensor(index, device=self._state.mask.device))


def _together(first: Prefilled, second: Prefilled, config: Any) -> Prefilled:
    """The rows of both in a new cache, padded on the left; leading columns that are empty in `first` are cut."""
    start = int(first.mask.any(0).long().argmax())
    width = max(first.mask.shape[1] - start, second.mask.shape[1])
    cache = growing_cache(config)
    layers = zip(first.cache.layers, second.cache.layers, strict=True)
    for index, (a, b) in enumerate(layers):
        keys, values = (  # (rows of both, heads, width, size)
            torch.cat([_left(x[:, :, start:], width, 2), _left(y, width, 2)])
            for x, y in ((a.keys, b.keys), (a.values, b.values))
        )
        cache.update(keys, values, index)
    return Prefilled(
        logits=torch.cat([first.logits, second.logits]),
        cache=cache,
        mask=torch.cat([_left(first.mask[:, start:], width, 1), _left(second.mask, width, 1)]),
        next_positions=torch.cat([first.next_positions, second.next_positions]),
        axes=first.axes,
    )


def _left(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """The tensor with zeros before it, so that it has `width` entries along `dim`."""
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (width - tensor.shape[dim], 0))
