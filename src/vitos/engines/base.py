"""How tokens are sampled: the protocol that every engine keeps, and what passes through it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from vitos.core.prompt import Prompt
from vitos.core.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vitos.engines.prefix import Prefix


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is drawn.

    Attributes:
        max_tokens: hard limit on its length.
        temperature: 0 is greedy; otherwise the whole distribution is sampled (no top-k or top-p, which would bias
            the policy-gradient ratio).
        stop: a completion also ends with the token that brings one of these strings into its text.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_tokens must be >= 1 and temperature >= 0, got {self}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt.

    Attributes:
        token_ids: shape (L,), the stop token included where one was reached, on the CPU.
        logprobs: shape (L,), float32, under the sampler's own distribution (temperature and bans applied).
        text: decoded, without special tokens.
        finished: a stop token or stop string was reached; otherwise the length limit cut it off.
    """

    token_ids: Tensor
    logprobs: Tensor
    text: str
    finished: bool


Span = Callable[[str], AbstractContextManager[None]]
"""Times a move: `with stage("prefill"): …`."""


class Engine(Protocol):
    """Samples completions of prompts."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        span: Span = ...,
        prefixes: Sequence[Prefix | None] | None = ...,
    ) -> list[list[Completion]]:
        """For every prompt one completion for each of its seeds; siblings share the prompt's prefill.

        Args:
            span: called with "prefill" and "decode", to time them.
            prefixes: for every prompt what has run of it already, or None; an engine need not make use of it.
        """
        ...


def derive_seed(*parts: int | str) -> int:
    """A seed of 64 bits from a path such as (run seed, step, sample id, branch, i, j), whatever the order of work."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Pieces:
    """What is new of a text that grows token by token. A character may need several: half of one is not shown."""

    def __init__(self) -> None:
        self._shown = ""

    def next(self, text: str) -> str:
        """What can be shown now, of the whole text so far; often nothing."""
        return "" if text.endswith("\ufffd") or not text.startswith(self._shown) else self.rest(text)

    def rest(self, text: str) -> str:
        """What was not shown yet of the finished text."""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def count_run(
    watch: Stopwatch,
    branch: str,
    prompts: Sequence[Prompt],
    prefixes: Sequence[Prefix | None],
    completions: Sequence[Sequence[Completion]],
) -> None:
    """Count the tokens of a sampled branch: those of the prompts that ran, and those that were written."""
    ran = sum(len(p) - (len(x) if x else 0) for p, x in zip(prompts, prefixes, strict=True))
    watch.count(f"{branch}_prefill", ran)
    watch.count(f"{branch}_decode", sum(len(c.token_ids) for row in completions for c in row))
