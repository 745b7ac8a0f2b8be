"""Prometheus figures of a server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vitos.policy.types import Finding

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.77, 1.0)


class Metrics:
    """What `/metrics` shows.

    Args:
        running, waiting: questions now.
    """

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("vitos_requests", "Chat requests by outcome.", ["outcome"], registry=self._registry)
        self._seconds = Histogram(
            "vitos_stage_seconds", "Seconds by stage.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self._tokens = Counter("vitos_tokens", "Tokens by stage.", ["stage"], registry=self._registry)
        self._kept = Histogram(
            "vitos_kept_ratio", "Share of visual tokens kept.", buckets=_SHARES, registry=self._registry
        )
        self._answers = Counter(
            "vitos_answers", "Answers by plan and whether it fell back.", ["plan", "fallback"], registry=self._registry
        )
        for name, text, read in (
            ("vitos_running", "Questions that are being answered.", running),
            ("vitos_waiting", "Questions in the queue.", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def answered(self, finding: Finding) -> None:
        """Count an answer."""
        for stage, seconds in finding.seconds.items():
            self._seconds.labels(stage).observe(seconds)
        for stage, tokens in finding.tokens.items():
            self._tokens.labels(stage).inc(tokens)
        self._kept.observe(finding.kept_ratio)
        self._answers.labels(finding.plan, str(finding.fallback).lower()).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
