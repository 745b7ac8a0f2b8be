"""The default engine: plain PyTorch on the Hugging Face model, anywhere.

Each distinct prompt runs once for all its siblings. Sampling: *prefill* the prompt, *decode* its siblings token by
token behind one copy of its keys and values (`siblings.py`; a copy for each where that cannot be). Scoring: prompt and
siblings packed into one row (`packing.py`), the head on completion tokens only and in chunks (`head.py`); its gradient
is the exact policy gradient of all siblings.

Sampling is seeded per completion, not per batch: a completion's uniform numbers come from its own seed and turn into
tokens by the inverse of the cumulative distribution. So the same seed gives the same text whatever shares its batch,
up to floating-point differences between batch shapes. Ended rows leave the batch whenever they are half of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.prompt import Prompt, pad_prompts
from vitos.engines.base import Completion, Pieces, Sampling, Span
from vitos.engines.chunked_logprobs import HEAD_TOKENS, check_untouched, chunked_head
from vitos.engines.group_decode import Siblings
from vitos.engines.kv_cache import caching, growing_cache
from vitos.engines.packing import attention_masks, pack
from vitos.engines.prefix import Prefilled, Prefix, cache_bytes, join

NARROWEST_SCORED = 0.75
"""Least part of a scoring batch's longest row that another may have: padding is below a quarter, and a batch differs
from the next one by a third at least, so there are few of them. Sampling has no such limit: every batch of it takes
the steps of its longest completion."""


def untimed(_: str) -> AbstractContextManager[None]:
    """A `Span` that measures nothing."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of given completions.

    Attributes:
        logprobs: float32, shape (R, L), rows in the order of the completions; 0 on padding.
        mask: bool, shape (R, L), True on a completion's tokens.
        hidden_prompt_tokens: prompt tokens that ran through the model, for cost accounting.
    """

    logprobs: Tensor
    mask: Tensor
    hidden_prompt_tokens: int


class TorchEngine:
    """Samples and scores with a backbone's model.

    Args:
        backbone: the model to run.
        model: what is called instead of `backbone.model`, such as its DDP or FSDP wrapper.
        max_batch_tokens: padded tokens that `sample` and a micro-batch of `score` run at once; more prompts are
            split, but not the siblings of one. Splitting changes no result beyond floating-point rounding. `score`
            runs what it is given: see `score_batches`.
        head_tokens: completion tokens whose logits `score` holds at once.

    Attributes:
        kv_bytes: of the cache at the end of the latest decoding, padding included.
    """

    samples_elsewhere = False
    """Completions come from other weights or kernels than those that score them."""

    def __init__(
        self,
        backbone: Backbone,
        model: Any | None = None,
        max_batch_tokens: int = 65536,
        head_tokens: int = HEAD_TOKENS,
    ) -> None:
        self.backbone = backbone
        self.head_tokens = head_tokens
        self.model = backbone.model if model is None else model
        self.max_batch_tokens = max_batch_tokens
        self._banned_ids: Tensor | None = None
        self.kv_bytes = 0

    @contextmanager
    def using(self, model: Any, max_batch_tokens: int) -> Iterator[None]:
        """Run another module instead of the backbone's, such as its DDP or FSDP wrapper, while the block runs."""
        before = self.model, self.max_batch_tokens
        self.model, self.max_batch_tokens = model, max_batch_tokens
        try:
            yield
        finally:
            self.model, self.max_batch_tokens = before

    # --- sampling ---------------------------------------------------------------------------------------------------

    def refresh(self) -> dict[str, float]:
        """Make the weights that sample those that are trained; figures for the log. Here they are the same."""
        return {}

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        span: Span = untimed,
        prefixes: Sequence[Prefix | None] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.sample`. Greedy sampling ignores the seeds' values.

        Args:
            prefixes: for every prompt the prefix that need not run again, or None. A prompt that hides visual tokens
                and has none runs its own.

        Raises:
            ValueError: for a prefix of another prompt or model.
        """
        prefixes = prefixes or [None] * len(prompts)
        if not len(prompts) == len(seeds) == len(prefixes):
            raise ValueError(f"{len(prompts)} prompts but seeds for {len(seeds)} and prefixes for {len(prefixes)}")
        out: list[list[Completion]] = [[] for _ in prompts]
        continued = [x is not None or p.hidden is not None for p, x in zip(prompts, prefixes, strict=True)]
        for kind in (False, True):
            group = [i for i, flag in enumerate(continued) if flag == kind]
            sizes = [self._room(prompts[i].cached_length, len(seeds[i]), sampling.max_tokens) for i in group]
            for chunk in chunk_by_tokens(sizes, self.max_batch_tokens):
                rows = [group[i] for i in chunk]
                counted = [seeds[i] for i in rows]
                with span("prefill"):
                    ready = self.prefill([prompts[i] for i in rows], [prefixes[i] for i in rows])
                with span("decode"):
                    completions = iter(_result(self._decode(ready, sampling, counted)))
                for i in rows:
                    out[i] = [next(completions) for _ in seeds[i]]
        return out

    def _room(self, length: int, siblings: int, tokens: int) -> tuple[int, int]:
        """Rows that a prompt takes in sampling, and their tokens."""
        if Siblings.can(self.backbone, [siblings]):
            return 1, length + siblings * tokens
        return siblings, length + tokens

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, sampling: Sampling, span: Span = untimed, prefix: Prefix | None = None
    ) -> Generator[str, None, Completion]:
        """Yield one completion's text as it is written, and return the completion; arguments as in `sample`."""
        with span("prefill"):
            ready = self.prefill([prompt], [prefix])
        steps = self._decode(ready, sampling, [[0]])
        ids: list[int] = []
        written = Pieces()
        while True:
            with span("decode"):
                try:
                    ids.append(int(next(steps)[0]))
                except StopIteration as end:
                    completion: Completion = end.value[0]
                    break
            if piece := written.next(self.texts([ids])[0]):
                yield piece
        if piece := written.rest(completion.text):
            yield piece
        return completion

    @torch.no_grad()
    def prefix(self, head: Prompt) -> Prefix:
        """Run the head of prompts (`Prompt.head` of their `prefix_length`), whose keys and values many may share.

        Alone: no padding, and nothing that another row's image could change.

        Raises:
            ValueError: for a family whose cache does not hold every token.
        """
        if refusal := self.backbone.cache_refusal:
            raise ValueError(refusal)
        cache = self.prefill([head], [None]).cache
        layers = tuple((layer.keys[0], layer.values[0]) for layer in cache.layers)
        return Prefix(head, layers, self.backbone.model)

    def _decode(
        self, ready: Prefilled, sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Generator[Tensor, None, list[Completion]]:
        """Yield the tokens of the completions that are still written, step by step; return all of them."""
        counts, device = [len(row) for row in seeds], ready.mask.device
        running: Prefilled | Siblings = (
            Siblings.of(ready, counts, self.backbone) if Siblings.can(self.backbone, counts) else ready.expand(counts)
        )
        rows = sum(counts)
        numbers = np.stack([_uniform(seed, sampling.max_tokens) for row in seeds for seed in row])
        noise = torch.from_numpy(numbers).to(device)
        stops = torch.tensor(self.backbone.stop_token_ids, device=device)
        ids = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        scores = torch.zeros(rows, sampling.max_tokens, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        place = torch.arange(rows, device=device)  # which running completion is which
        for step in range(sampling.max_tokens):
            log_p = self.log_softmax(running.logits, sampling.temperature)
            token = _draw(log_p, noise[place, step]) if sampling.temperature > 0 else log_p.argmax(-1)
            ids[place, step], scores[place, step] = token, log_p.gather(-1, token[:, None])[:, 0]
            lengths[place] += ~finished[place]
            finished[place] |= torch.isin(token, stops)
            if sampling.stop:
                finished[place] |= self._holds(ids[place, : step + 1], sampling.stop)
            yield token
            left = (~finished[place]).nonzero()[:, 0]
            if step + 1 == sampling.max_tokens or len(left) == 0:
                break
            if 2 * len(left) <= len(place):  # moving the cache together costs about as much as one token
                running, place, token = running.select(left), place[left], token[left]
            running.advance(self.model, token)
        self.kv_bytes = cache_bytes(running.cache)
        ids, scores, ended = ids.cpu(), scores.cpu(), finished.tolist()
        check_finite(scores)
        written = [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]
        texts = self.texts(written)
        return [Completion(row, scores[r, : len(row)], texts[r], ended[r]) for r, row in enumerate(written)]

    def texts(self, ids: Sequence[Any] | Tensor) -> list[str]:
        texts: list[str] = self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def _holds(self, ids: Tensor, stop: Sequence[str]) -> Tensor:
        """Bool (R,): a stop string ends in the last of `ids` (R, L); a token is a byte or more, so few are read."""
        window = max(len(text.encode()) for text in stop) + 8
        texts = self.texts(ids[:, -window:].cpu())
        return torch.tensor([any(s in text for s in stop) for text in texts], device=ids.device)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], temperature: float = 1.0
    ) -> Scores:
        """Log-probabilities of completions, differentiable where gradients are on; each prompt runs once.

        Args:
            prompts: B prompts.
            completions: for every prompt the token ids (L,) of its completions, R in all.
            temperature: of the distribution, as in sampling.

        Raises:
            ValueError: for a model that cannot be scored this way; see `attention_masks` and `check_untouched`.
        """
        packed = pack(prompts, completions, self.backbone.pad_token_id)
        config, family = self.backbone.model.config.get_text_config(), self.backbone.model.config.model_type
        inputs = self.backbone.model_inputs(packed.batch)
        visual = None
        if self.backbone.capabilities.bidirectional_views:
            visual = (packed.segments == 0) & (packed.batch.input_ids == self.backbone.visual_token_id)
        inputs["attention_mask"] = attention_masks(packed, config, self.backbone.model.dtype, visual)

        def log_softmax(logits: Tensor) -> Tensor:
            return self.log_softmax(logits, temperature)

        head = self.backbone.model.get_output_embeddings()
        with chunked_head(head, packed.sources, packed.targets, log_softmax, self.head_tokens) as given:
            out = self.model(**inputs, use_cache=False)
        check_untouched(given, out.logits, family)
        zeros = torch.zeros(packed.mask.shape, dtype=torch.float32, device=packed.mask.device)
        logprobs = zeros.masked_scatter(packed.mask, out.logits.float())
        return Scores(logprobs, packed.mask, sum(len(p) for p in prompts))

    def score_batches(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
        """Indices of the prompts that `score` shall run together: within `max_batch_tokens`, of like lengths."""
        sizes = [(1, len(p) + sum(map(len, ids))) for p, ids in zip(prompts, completions, strict=True)]
        return chunk_by_tokens(sizes, self.max_batch_tokens, NARROWEST_SCORED)

    # --- the moves of sampling ---------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix | None]) -> Prefilled:
        """Run prompts of one kind: all in full, or all behind their prefixes without the tokens that they hide."""
        config = self.backbone.model.config.get_text_config()
        if prefixes[0] is None and prompts[0].hidden is None:
            batch, cache = pad_prompts(prompts, self.backbone.pad_token_id, side="left"), growing_cache(config)
            mask = batch.attention_mask
        else:
            known = [
                self.prefix(p.head(p.prefix_length)) if x is None else x
                for p, x in zip(prompts, prefixes, strict=True)
            ]
            if not all(x.covers(p, self.backbone.model) for p, x in zip(prompts, known, strict=True)):
                raise ValueError("a prefix belongs to another prompt, image or model; leave it out")
            tails = [p.tail(len(x)) for p, x in zip(prompts, known, strict=True)]
            batch = pad_prompts(tails, self.backbone.pad_token_id, side="left")
            cache, mask = join(known, [p.hidden for p in prompts], config)
            mask = torch.cat([mask, batch.attention_mask], dim=1)
        inputs = self.backbone.model_inputs(batch) | {"attention_mask": mask}
        out = self.model(**inputs, **caching(cache), logits_to_keep=1)
        return Prefilled(out.logits[:, -1], cache, mask, batch.next_positions, batch.position_ids.shape[0])

    def log_softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """float32 log-probabilities with the banned tokens left out."""
        logits = logits.float() / (temperature if temperature > 0 else 1.0)
        return logits.index_fill(-1, self._banned(logits.device), float("-inf")).log_softmax(-1)

    def _banned(self, device: torch.device) -> Tensor:
        """`banned_token_ids` on the device, moved there once and not at every token."""
        known = self._banned_ids
        if known is None or known.device != device:
            known = self._banned_ids = torch.tensor(self.backbone.banned_token_ids, device=device)
        return known


def check_finite(logprobs: Tensor) -> None:
    """Raise a ValueError for log-probabilities of chosen tokens that are no numbers."""
    if bool(logprobs.isnan().any()):
        raise ValueError("the model's logits are not finite: its weights are broken, or its dtype overflows")


def chunk_by_tokens(sizes: Sequence[tuple[int, int]], budget: int, narrowest: float = 0.0) -> Iterator[list[int]]:
    """Indices of prompts, widest first, cut so that the padded tokens of each chunk stay within the budget.

    Args:
        sizes: of each prompt: the rows it takes and the tokens of the longest of them.
        budget: rows times the widest row of a chunk; one prompt alone may exceed it.
        narrowest: a prompt below this part of a chunk's widest row begins the next chunk, so that one long prompt does
            not pad many short ones to its length.
    """
    chunk: list[int] = []
    rows = widest = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i)):
        own, width = sizes[i]
        if chunk and ((rows + own) * widest > budget or width < narrowest * widest):
            yield chunk
            chunk, rows = [], 0
        if not chunk:
            widest = width
        chunk.append(i)
        rows += own
    if chunk:
        yield chunk


def _result(steps: Generator[Any, None, list[Completion]]) -> list[Completion]:
    """What a generator returns, all that it yields left unread."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: list[Completion] = end.value
            return done


def _uniform(seed: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that depend on the seed alone (a counter-based generator)."""
    numbers: np.ndarray = np.random.Generator(np.random.Philox(key=seed)).random(count)
    return numbers


def _draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (R,) by the inverse of the cumulative distribution, in float64 for large vocabularies."""
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    # Scaled by the last value, which rounding leaves a little beside 1; a token of probability 0 is never hit.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
