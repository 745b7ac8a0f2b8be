"""How tokens are sampled: the protocol of all engines, and the types of its arguments and results."""

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
        max_tokens: largest number of tokens.
        temperature: temperature of the distribution; 0 is greedy. The whole distribution is sampled: top-k or top-p
            would bias the policy-gradient ratio.
        stop: strings that end a completion: the token that completes one of them is the last.
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
        token_ids: its tokens on the CPU, including the stop token if one was reached, shape (L,).
        logprobs: log-probabilities under the sampler's distribution (temperature and bans applied), float32, (L,).
        text: the decoded text, without special tokens.
        finished: whether a stop token or stop string was reached; otherwise the length limit ended it.
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
        """One completion per seed of each prompt; the completions of a prompt share its prefill.

        Args:
            span: called with "prefill" and "decode", to time them.
            prefixes: for every prompt what has run of it already, or None; an engine need not make use of it.
        """
        ...


def derive_seed(*parts: int | str) -> int:
    """A seed of 64 bits from a path such as (run seed, step, sample id, branch, i, j); see docs/method.md, section 6.

    It does not depend on the order in which completions are sampled.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Pieces:
    """The new part of a text that grows token by token.

    A character can take several tokens; it is shown only when it is complete.
    """

    def __init__(self) -> None:
        self._shown = ""

    def next(self, text: str) -> str:
        """The part that can be shown now, given the whole text so far; often empty."""
        return "" if text.endswith("\ufffd") or not text.startswith(self._shown) else self.rest(text)

    def rest(self, text: str) -> str:
        """The part of the finished text that has not been shown."""
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
    ran = sum(x.left(p) if x else len(p) for p, x in zip(prompts, prefixes, strict=True))
    watch.count(f"{branch}_prefill", ran)
    watch.count(f"{branch}_decode", sum(len(c.token_ids) for row in completions for c in row))
