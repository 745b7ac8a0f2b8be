"""The default engine: plain PyTorch on the Hugging Face model, on any device.

Each distinct prompt runs once for all its completions. Sampling: *prefill* the prompt, *decode* its completions token
by token behind one copy of its keys and values (`group_decode.py`; one copy per completion if the model does not allow
that). Scoring: pack prompt and completions into one row (`packing.py`), and run the head on the completions' tokens
only, in chunks (`chunked_logprobs.py`); the gradient is the exact policy gradient of all completions.

Sampling is seeded per completion, not per batch: the uniform numbers of a completion come from its seed, and the
inverse of the cumulative distribution turns them into tokens. So the same seed gives the same text in any batch, up to
floating-point differences between batch shapes. Rows that have ended leave the batch once they are half of it.
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
from vitos.engines.batches import chunk_by_tokens
from vitos.engines.chunked_logprobs import HEAD_TOKENS, check_untouched, chunked_head
from vitos.engines.draws import only_cells, sample_cells, score_cells
from vitos.engines.group_decode import Siblings
from vitos.engines.in_flight import attach_late_masks, check_late_masks, run_early, run_late
from vitos.engines.kv_cache import caching, growing_cache
from vitos.engines.packing import attention_masks, pack
from vitos.engines.prefix import Prefilled, Prefix, cache_bytes, join

NARROWEST_SCORED = 0.75
"""Smallest length of a row in a scoring batch, as a share of its longest row. Padding is then below a quarter, and the
longest rows of two batches differ by at least a third, so there are few batches. Sampling has no such limit, because a
batch takes the steps of its longest completion whatever the lengths of its prompts."""


def untimed(_: str) -> AbstractContextManager[None]:
    """A `Span` that measures nothing."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of given completions.

    Attributes:
        logprobs: log-probability of each token, 0 on padding, rows in the order of the completions, float32, (R, L).
        mask: True on a completion's tokens, bool, shape (R, L).
        prompt_tokens_run: number of prompt tokens that ran through the model, for cost accounting.
        entropies: entropy of the distribution that each token was chosen from, in nats, 0 on padding, (R, L); None
            unless asked for.
    """

    logprobs: Tensor
    mask: Tensor
    prompt_tokens_run: int
    entropies: Tensor | None = None


class TorchEngine:
    """Samples and scores with a backbone's model.

    Args:
        backbone: the model to run.
        model: the model to call instead of `backbone.model`, such as its DDP or FSDP wrapper.
        max_batch_tokens: number of padded tokens that run at once. More prompts are split into batches, but not the
            completions of one prompt; splitting changes results by rounding only. `score` runs everything that it is
            given: see `score_batches`.
        head_tokens: number of completion tokens whose logits `score` holds at once.

    Attributes:
        sampling_tokens: number of padded tokens that `sample` runs at once; None: `max_batch_tokens`.
        kv_bytes: size of the cache at the end of the latest decoding, padding included, in bytes.
    """

    samples_elsewhere = False
    """Whether completions come from other weights or kernels than those that score them."""

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
        self.sampling_tokens: int | None = None
        self._banned_ids: Tensor | None = None
        self.kv_bytes = 0

    @contextmanager
    def using(self, model: Any, max_batch_tokens: int, sampling_tokens: int | None = None) -> Iterator[None]:
        """Run another module instead of the backbone's, such as its DDP or FSDP wrapper, while the block runs."""
        before = self.model, self.max_batch_tokens, self.sampling_tokens
        self.model, self.max_batch_tokens, self.sampling_tokens = model, max_batch_tokens, sampling_tokens
        try:
            yield
        finally:
            self.model, self.max_batch_tokens, self.sampling_tokens = before

    # --- sampling ---------------------------------------------------------------------------------------------------

    def refresh(self) -> dict[str, float]:
        """Give the sampler the trained weights; returns figures for the log. Here both are the same weights."""
        return {}

    def release(self) -> None:
        """Give back the memory that only sampling needs, until the next `refresh`. Here there is none."""

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
            prefixes: the prefix of each prompt that need not run again, or None. If a prompt hides visual tokens and
                has none, its prefix is run here.

        Raises:
            ValueError: for a prefix of another prompt or model.
        """
        prefixes = prefixes or [None] * len(prompts)
        if not len(prompts) == len(seeds) == len(prefixes):
            raise ValueError(f"{len(prompts)} prompts but seeds for {len(seeds)} and prefixes for {len(prefixes)}")
        for prompt in prompts:
            self.backbone.check_room(max(len(prompt), prompt.next_position), sampling.max_tokens)
        if (cells := only_cells(prompts)) is not None:
            with span("prefill"):
                return sample_cells(self, cells, sampling, seeds, prefixes)
        out: list[list[Completion]] = [[] for _ in prompts]
        kinds = [_kind(p, x) for p, x in zip(prompts, prefixes, strict=True)]
        for kind in dict.fromkeys(sorted(kinds)):
            group = [i for i, own in enumerate(kinds) if own == kind]
            sizes = [self._room(prompts[i].cached_length, len(seeds[i]), sampling.max_tokens) for i in group]
            for chunk in chunk_by_tokens(sizes, self.sampling_tokens or self.max_batch_tokens):
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
        """Number of rows that a prompt takes in sampling, and number of tokens in each."""
        if Siblings.can(self.backbone, [siblings]):
            return 1, length + siblings * tokens
        return siblings, length + tokens

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, sampling: Sampling, span: Span = untimed, prefix: Prefix | None = None
    ) -> Generator[str, None, Completion]:
        """Yield one completion's text as it is written, and return the completion; arguments as in `sample`."""
        self.backbone.check_room(max(len(prompt), prompt.next_position), sampling.max_tokens)
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
        """Run the part that several prompts share (`Prompt.head` of their `prefix_length`).

        It runs alone in its batch, without padding, so that no other row can influence it.

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
        """Yield the next token of each completion that has not ended, step by step; return all completions."""
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
        place = torch.arange(rows, device=device)  # number of each completion that has not ended
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
            if 2 * len(left) <= len(place):  # copying the cache costs about as much as one token
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
        """Whether the last of `ids` (R, L) completes a stop string, bool (R,); only the last few tokens are read."""
        window = max(len(text.encode()) for text in stop) + 8  # a token is at least one byte
        texts = self.texts(ids[:, -window:].cpu())
        return torch.tensor([any(s in text for s in stop) for text in texts], device=ids.device)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        """Log-probabilities of completions, differentiable if gradients are enabled; each prompt runs once.

        Args:
            prompts: B prompts.
            completions: the token ids of each prompt's completions, each of shape (L,), R in total.
            temperature: temperature of the distribution, as in sampling.
            entropy: whether the entropy of each token's distribution is computed, too.

        Raises:
            ValueError: for a model that cannot be scored this way; see `attention_masks` and `check_untouched`.
        """
        if (cells := only_cells(prompts)) is not None:
            logprobs, mask, spread = score_cells(self, cells, completions, temperature)
            return Scores(logprobs, mask, sum(len(p) for p in prompts), spread if entropy else None)
        packed = pack(prompts, completions, self.backbone.pad_token_id)
        config, family = self.backbone.model.config.get_text_config(), self.backbone.model.config.model_type
        inputs = self.backbone.model_inputs(packed.batch)
        visual = None
        if self.backbone.capabilities.bidirectional_views:
            visual = (packed.segments == 0) & (packed.batch.input_ids == self.backbone.visual_token_id)
        dtype, after = self.backbone.model.dtype, packed.after
        inputs["attention_mask"] = masks = attention_masks(packed, config, dtype, visual)
        late = []
        if after is not None:
            behind = attention_masks(packed.behind(), config, dtype, visual)
            late = attach_late_masks(self.backbone, masks, behind, after)

        def log_softmax(logits: Tensor) -> Tensor:
            return self.log_softmax(logits, temperature)

        head = self.backbone.model.get_output_embeddings()
        with chunked_head(head, packed.sources, packed.targets, log_softmax, self.head_tokens, entropy) as given:
            out = self.model(**inputs, use_cache=False)
        check_untouched(given, out.logits, family)
        if after is not None:
            check_late_masks(self.backbone, late, after)
        zeros = torch.zeros(packed.mask.shape, dtype=torch.float32, device=packed.mask.device)
        logprobs, *more = (zeros.masked_scatter(packed.mask, part) for part in out.logits.float().unbind(-1))
        return Scores(logprobs, packed.mask, sum(len(p) for p in prompts), *more)

    def score_batches(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
        """Indices of prompts for `score` to run together: within `max_batch_tokens`, and of similar length."""
        sizes = [(1, len(p) + sum(map(len, ids))) for p, ids in zip(prompts, completions, strict=True)]
        return chunk_by_tokens(sizes, self.max_batch_tokens, NARROWEST_SCORED)

    # --- the moves of sampling ---------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix | None]) -> Prefilled:
        """Run prompts of one kind: all of them in full, or all behind their prefixes, without the hidden tokens."""
        if prompts[0].after is not None:
            return run_late(self, prompts, run_early(self, prompts, prefixes, prompts[0].after))
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
        """Log-probabilities in float32, with the banned tokens excluded."""
        logits = logits.float() / (temperature if temperature > 0 else 1.0)
        return logits.index_fill(-1, self._banned(logits.device), float("-inf")).log_softmax(-1)

    def _banned(self, device: torch.device) -> Tensor:
        """`banned_token_ids` on the device, copied there once instead of at every token."""
        known = self._banned_ids
        if known is None or known.device != device:
            known = self._banned_ids = torch.tensor(self.backbone.banned_token_ids, device=device)
        return known


def _kind(prompt: Prompt, prefix: Prefix | None) -> tuple[int, bool]:
    """What prompts of one batch have in common: the layer behind which tokens leave, else whether a prefix has run."""
    if prompt.after is not None:
        return 1 + prompt.after, True
    return 0, prefix is not None or prompt.hidden is not None


def check_finite(logprobs: Tensor) -> None:
    """Raise a ValueError if a log-probability is not a number."""
    if bool(logprobs.isnan().any()):
        raise ValueError(
            "the model's logits are not finite: its weights are broken, or its dtype overflows; check the weights, or "
            "load the model in bfloat16 or float32"
        )


def _result(steps: Generator[Any, None, list[Completion]]) -> list[Completion]:
    """The return value of a generator; what it yields is ignored."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: list[Completion] = end.value
            return done


def _uniform(seed: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that depend only on the seed (a counter-based generator)."""
    numbers: np.ndarray = np.random.Generator(np.random.Philox(key=seed)).random(count)
    return numbers


def _draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (R,) from the inverse of the cumulative distribution, in float64 for large vocabularies."""
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    # Scaled by the last value, which rounding leaves slightly off 1; a token of probability 0 is never drawn.
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
