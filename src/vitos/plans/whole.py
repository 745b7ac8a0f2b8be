"""Plans that encode the whole image once, and never again: two_pass, gather and dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitos.backbones.base import Backbone
from vitos.finding import Query, Stopwatch
from vitos.plans.base import NO_BOX, Limits, Outcome, Plan, Steps, localized, reasoned
from vitos.spec import PlanName

if TYPE_CHECKING:
    from vitos.policy import SparseVLM


class TwoPass(Plan):
    """Localize on all visual tokens, prefill a prompt of the kept ones anew (the paper)."""

    name: ClassVar[PlanName] = "two_pass"

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        located = yield from localized(vlm, queries, limits)
        with watch.stage("sparsify"):
            kept = [vlm.select(q, r.response) for q, r in zip(queries, located, strict=True)]
            prompts = vlm.reason_prompts(queries, kept)
        answered = yield from reasoned(vlm, queries, prompts, limits)
        grids = [query.scan.visuals[0].grid for query in queries]
        return [
            Outcome(place, reason, grid, selection.mask, NO_BOX * selection.fallback)
            for place, reason, grid, selection in zip(located, answered, grids, kept, strict=True)
        ]


class Gather(TwoPass):
    """The same steps on prompts that hide tokens (the spec's plan makes them so); the image runs once for both."""

    name: ClassVar[PlanName] = "gather"

    def refusal(self, backbone: Backbone) -> str:
        return backbone.cache_refusal

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        return (yield from super().steps(vlm, vlm.with_prefixes(queries, watch), limits, watch))


class Dense(Plan):
    """No localization: reason on all visual tokens."""

    name: ClassVar[PlanName] = "dense"

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        answered = yield from reasoned(vlm, queries, vlm.reason_prompts(queries, [None] * len(queries)), limits)
        grids = [query.scan.visuals[0].grid for query in queries]
        return [
            Outcome(None, reason, grid, np.ones(grid.num_tokens, dtype=bool))
            for reason, grid in zip(answered, grids, strict=True)
        ]
