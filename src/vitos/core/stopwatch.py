"""The cost of work: seconds and tokens by span."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Stopwatch:
    """Adds up wall-clock seconds and tokens by span; waits for the GPU, so that a span pays for the kernels it starts.

    >>> watch = Stopwatch()
    >>> with watch.span("vision"):
    ...     watch.count("vision", 64)
    >>> watch.tokens, watch.seconds["vision"] >= 0
    ({'vision': 64}, True)
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to a span."""
        started = self._now()
        try:
            yield
        finally:
            self.spend(name, self._now() - started)

    def spans(self, prefix: str) -> Callable[[str], AbstractContextManager[None]]:
        """A function that opens the span `<prefix>_<name>` for a name."""
        return lambda name: self.span(f"{prefix}_{name}")

    def spend(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a span."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def count(self, name: str, tokens: int) -> None:
        """Add tokens to a span; zero tokens leave no entry."""
        if tokens:
            self.tokens[name] = self.tokens.get(name, 0) + tokens

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
