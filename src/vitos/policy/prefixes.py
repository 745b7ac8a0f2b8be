"""System text and images, run once for all questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitos.core.stopwatch import Stopwatch
from vitos.engines.in_flight import run_early
from vitos.engines.prefix import Prefix
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.types import Query, Scan


def with_prefixes(
    branches: Branches, engine: TorchEngine, queries: Sequence[Query], watch: Stopwatch, layers: int | None = None
) -> list[Query]:
    """The same questions, with system text and image run once per scan that has not run yet (span "prefix").

    Args:
        branches: prompts of the model.
        engine: the engine that runs them.
        queries: the questions.
        watch: a stopwatch.
        layers: number of the first layers to run (`Plan.shared_layers`); None for all.

    Raises:
        ValueError: for a family whose cache does not hold all tokens.
    """
    ran: dict[tuple[Scan, tuple[int, ...]], Prefix] = {}
    out = []
    for query in queries:
        scan = query.scan
        prompt = branches.localize_prompt(query) if layers is None else branches.reason_prompt(query)
        prompt = replace(prompt, after=layers)
        if scan.prefix is None or not scan.prefix.covers(prompt, branches.backbone.model):
            head = prompt.head(prompt.prefix_length)
            key = (scan, tuple(head.input_ids.tolist()))
            if key not in ran:
                with watch.span("prefix"):
                    ran[key] = engine.prefix(head) if layers is None else run_early(engine, [head], [None], layers)[0]
                watch.count("prefix", len(head))
            scan = replace(scan, prefix=ran[key])
        out.append(replace(query, scan=scan))
    return out
