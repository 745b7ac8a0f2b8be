"""The engine `vllm`: rollouts are sampled by vLLM and scored by the model that is trained.

vLLM holds a copy of the weights. `refresh` wakes it, writes the trained weights into it in place, one tensor at a time
(`engines/weights.py`: adapters added, shards gathered), counts them, empties its caches and compares one
log-probability, so that no update is sampled with the weights of the update before. `release` gives its memory back
until then. In several processes each has its own vLLM, and all call `refresh` together, since it gathers shards.

The remaining difference between the two engines (kernels, number formats) is corrected in the loss by the sampler's
log-probabilities, which every completion carries, and logged as `mismatch_kl`.

`Sampler` is the interface to vLLM; `sampler.py` implements it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.prompt import Prompt
from vitos.engines.base import Completion, Sampling, Span
from vitos.engines.prefix import Prefix
from vitos.engines.torch_engine import TorchEngine, untimed
from vitos.engines.weights import effective_weights

PROBE = "Which weights are these?"
"""Text of the prompt whose next token is compared each time weights have been pushed."""


class WeightsError(RuntimeError):
    """The sampler does not hold the trained weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One completion to be sampled; temperature 0 is greedy. The sampler has one set of stop and banned tokens."""

    prompt: Prompt
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """The L tokens of a completion, including the stop token, and their log-probabilities under the sampler."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass(frozen=True, slots=True)
class Received:
    """The result of pushing weights: number of tensors that arrived, and names of parameters that none reached."""

    tensors: int
    untouched: tuple[str, ...]


class Sampler(Protocol):
    """What the engine needs from vLLM."""

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """One completion per request. Requests with the same `Prompt` object share its conversion for the sampler."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Received:
        """Write weights in place, named as in the Hugging Face model, and empty all caches."""
        ...

    def sleep(self) -> None:
        """Give back the memory of weights and caches, whose content may be lost; all of it is written again later."""
        ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of one part again: of the weights before `load`, of the cache after it."""
        ...


class VllmEngine(TorchEngine):
    """Samples with a `Sampler`, scores as `TorchEngine` does.

    Args:
        backbone: the model that is trained, whole or sharded, with or without adapters.
        sampler: the sampler, which holds a copy of the model.
        tolerance: largest allowed difference of the compared log-probability. The default is for the same number
            format in both; bfloat16 needs about 0.1.
    """

    samples_elsewhere = True

    def __init__(self, backbone: Backbone, sampler: Sampler, tolerance: float = 1e-3) -> None:
        super().__init__(backbone)
        self.sampler = sampler
        self.tolerance = tolerance
        self._pushed = self._asleep = False

    @torch.no_grad()
    def refresh(self) -> dict[str, float]:
        """Wake the sampler and push all weights; processes that hold shards call it together.

        Returns:
            Figures for the log: number of tensors, and difference of the compared log-probability.

        Raises:
            WeightsError: if a tensor did not arrive, a parameter of the sampler was not written, or the two models
                disagree.
        """
        weights = effective_weights(self.backbone.model)
        if self._asleep:
            self.sampler.wake("weights")
        received = self.sampler.load((name, make()) for name, make in weights.items())
        if received.tensors != len(weights) or received.untouched:
            raise WeightsError(
                f"{received.tensors} of {len(weights)} tensors reached the sampler, and {len(received.untouched)} of "
                f"its parameters were not written: {', '.join(received.untouched[:5])}"
            )
        if self._asleep:
            self.sampler.wake("kv_cache")  # only now, so that pushing needs no memory besides that of the weights
        self._asleep, self._pushed = False, True
        gap = self._gap()
        if not gap <= self.tolerance:
            raise WeightsError(
                f"after the weights were pushed, the log-probability of one token differs by {gap:.2g} between the "
                f"sampler and the trained model; rounding explains at most {self.tolerance:g}"
            )
        return {"sampler/tensors": float(len(weights)), "sampler/logprob_gap": gap}

    def release(self) -> None:
        """Put the sampler to sleep; the next `refresh`, or `sample`, wakes it and pushes all weights."""
        self.sampler.sleep()
        self._asleep, self._pushed = True, False

    def _gap(self) -> float:
        """Difference between the log-probabilities of the sampler's greedy next token of a fixed text."""
        prompt = self.backbone.build_prompt(PROBE, [])
        (said,) = self.sampler.generate([SampleRequest(prompt=prompt, max_tokens=1, temperature=0.0, seed=0)])
        here = self.score([prompt], [[torch.tensor(said.token_ids)]])
        return abs(float(here.logprobs[0, 0]) - said.logprobs[0])

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        span: Span = untimed,
        prefixes: Sequence[Prefix | None] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.sample`. vLLM mixes prefill and decoding, so all its time counts as "decode".

        Args:
            prefixes: ignored; vLLM has its cache, and the prompts are complete.

        Raises:
            ValueError: for stop strings, and for hidden tokens (plan `gather`).
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but seeds for {len(seeds)}")
        if sampling.stop:
            raise ValueError("the vLLM engine knows no stop strings; leave them out, or use the torch engine")
        if any(prompt.hidden is not None for prompt in prompts):
            raise ValueError("the vLLM engine cannot hide tokens that have run; use the torch engine or another plan")
        if not self._pushed:
            self.refresh()
        requests = [
            SampleRequest(prompt=prompt, max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=seed)
            for prompt, row in zip(prompts, seeds, strict=True)
            for seed in row
        ]
        with span("decode"):
            drawn = self.sampler.generate(requests)
        texts = self.backbone.tokenizer.batch_decode([d.token_ids for d in drawn], skip_special_tokens=True)
        flat = iter(
            Completion(torch.tensor(d.token_ids), torch.tensor(d.logprobs, dtype=torch.float32), text, d.finished)
            for d, text in zip(drawn, texts, strict=True)
        )
        return [[next(flat) for _ in row] for row in seeds]
