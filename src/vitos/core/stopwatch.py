"""What work costs: seconds and tokens by span."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Stopwatch:
    """Adds up wall-clock seconds and tokens by span; waits for the GPU, so that a span pays for its own kernels."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.spend(name, self._now() - started)

    def spend(self, name: str, seconds: float) -> None:
        """Seconds of a span that was timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def count(self, name: str, tokens: int) -> None:
        """Tokens of a span, where there are any."""
        if tokens:
            self.tokens[name] = self.tokens.get(name, 0) + tokens

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
