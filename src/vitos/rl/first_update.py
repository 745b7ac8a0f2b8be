"""What is checked once per process, at its first update: that sampler and policy agree, and that both see the image.

Training without the image is a known disaster of the field: pixels are dropped on the way, texts stay fluent, and the
loss falls. Both checks cost two forward passes over two prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from vitos.core.prompt import Prompt
from vitos.engines.torch_engine import TorchEngine
from vitos.rl.distributed import sums
from vitos.rl.rollout import RolloutBatch

logger = logging.getLogger(__name__)
NO_EFFECT = 1e-6
"""Largest change of a log-probability, in nats, that counts as none."""


def blank(prompt: Prompt) -> Prompt:
    """The prompt with all visual tokens, on all streams, set to 0: the same text about no image."""
    streams = tuple(torch.zeros_like(stream) for stream in prompt.streams)
    return replace(prompt, embeddings=torch.zeros_like(prompt.embeddings), streams=streams)


@dataclass(frozen=True, slots=True)
class ImageEffect:
    """How log-probabilities of sampled tokens depend on the image, in nats.

    Attributes:
        change: largest change of a token's log-probability when the image is blanked.
        gap: mean distance between sampler and policy, both with the image.
        blank_gap: mean distance between the sampler and the policy without the image.
    """

    change: float
    gap: float
    blank_gap: float

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.change <= NO_EFFECT:
            return "a blank image leaves every log-probability as it is: the policy is trained without its images"
        if self.gap >= self.blank_gap:
            return (
                f"the sampler's log-probabilities are as near to the policy's without the image ({self.blank_gap:.2g} "
                f"nats apart) as with it ({self.gap:.2g}): the sampler does not see the images"
            )
        return ""


@torch.no_grad()
def image_effect(
    engine: TorchEngine, accelerator: Accelerator, batch: RolloutBatch, temperature: float
) -> ImageEffect | None:
    """The effect of the image on the reasonings of each process's first prompt; None if no prompt has an image.

    Reasonings are always written by the policy, boxes may come from a frozen one. All processes call it together.
    """
    siblings = [r.completion for r in batch.groups[0].reasonings[0]]
    prompts, ids = batch.reason_prompts[:1], [[c.token_ids for c in siblings]]
    seen, unseen = (engine.score(p, ids, temperature) for p in (prompts, [blank(p) for p in prompts]))
    sampled = torch.cat([c.logprobs for c in siblings]).to(seen.logprobs.device)  # (N,)
    with_image, without = seen.logprobs[seen.mask], unseen.logprobs[seen.mask]  # (N,) each
    counts = len(prompts[0].embeddings) > 0
    parts = (_mean(with_image - without), _mean(with_image - sampled), _mean(without - sampled), 1.0)
    change, gap, blank_gap, asked = sums(accelerator, [part * counts for part in parts])
    return ImageEffect(change / asked, gap / asked, blank_gap / asked) if asked else None


def _mean(values: Tensor) -> float:
    return float(values.abs().mean())


def check_image(effect: ImageEffect | None, questions: Sequence[str]) -> None:
    """Refuse to train a policy or to sample from an engine that does not see the images.

    Raises:
        ValueError: with the questions of the update and what to look at.
    """
    if effect is None:
        return
    logger.info("first update: %s", effect)
    if effect.problem:
        raise ValueError(
            f"{effect.problem} (first update, questions {list(questions)}). Check that the records name their images, "
            "that the question's <image> is kept, and the versions of transformers and vLLM"
        )


def check_mismatch(figures: Mapping[str, float], limit: float | None) -> None:
    """Refuse rollouts that another distribution than the policy's has written.

    Args:
        figures: figures of an update's first optimiser step; `mismatch_kl/…` are means over tokens, in nats.
        limit: largest mismatch; None for no limit.

    Raises:
        ValueError: with the mismatch and what to look at.
    """
    found = {name: value for name, value in figures.items() if name.startswith("mismatch_kl/")}
    for name, value in found.items():
        if limit is not None and not value <= limit:
            raise ValueError(
                f"{name} is {value:.3g} nats per token at the first update, more than train.max_mismatch_kl = "
                f"{limit:g}: the sampler does not write what the policy would. Look at the number formats of both, at "
                "positions and images of the prompts; or set a larger limit, or null"
            )
