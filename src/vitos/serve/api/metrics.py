"""Prometheus figures of one server, in a registry that belongs to it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vitos.policy.types import Finding

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.77, 1.0)


class Metrics:
    """What `/metrics` shows.

    Args:
        running, waiting: give the number of questions that are answered and that wait at this moment.
    """

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self._registry = to = CollectorRegistry()
        self.requests = Counter("vitos_requests", "Chat requests by outcome.", ["outcome"], registry=to)
        self._seconds = Histogram("vitos_stage_seconds", "Seconds by stage.", ["stage"], buckets=_SECONDS, registry=to)
        self._tokens = Counter("vitos_tokens", "Tokens by stage.", ["stage"], registry=to)
        self._kept = Histogram("vitos_kept_ratio", "Share of visual tokens kept.", buckets=_SHARES, registry=to)
        told = "Answers by plan and whether it fell back."
        self._answers = Counter("vitos_answers", told, ["plan", "fallback"], registry=to)
        Gauge("vitos_running", "Questions that are being answered.", registry=to).set_function(running)
        Gauge("vitos_waiting", "Questions in the queue.", registry=to).set_function(waiting)

    def answered(self, finding: Finding) -> None:
        """Count an answered request."""
        self.requests.labels("answered").inc()
        for stage, seconds in finding.seconds.items():
            self._seconds.labels(stage).observe(seconds)
        for stage, tokens in finding.tokens.items():
            self._tokens.labels(stage).inc(tokens)
        self._kept.observe(finding.kept_ratio)
        self._answers.labels(finding.plan, str(finding.fallback).lower()).inc()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
