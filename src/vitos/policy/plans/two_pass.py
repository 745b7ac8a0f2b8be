"""Plans that encode the whole image once, and never again: two_pass, gather and dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vitos.backbones.base import Backbone
from vitos.core.geometry import TokenGrid
from vitos.core.names import PlanName
from vitos.core.response import Response
from vitos.core.sparsify import Selection
from vitos.core.stopwatch import Stopwatch
from vitos.policy.plans.base import NO_BOX, Limits, Look, Outcome, Plan, Steps, localized, reasoned
from vitos.policy.types import Query

if TYPE_CHECKING:
    from vitos.policy.vlm import SparseVLM


class TwoPass(Plan):
    """Localize on all visual tokens, prefill a prompt of the kept ones anew (the paper)."""

    name: ClassVar[PlanName] = "two_pass"

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        located = yield from localized(vlm, queries, limits)
        looks = self.looks(vlm, queries, [rollout.response for rollout in located], watch)
        answered = yield from reasoned(vlm, queries, [look.prompt for look in looks], limits)
        return [
            Outcome(place, reason, look.grid, look.selection.mask, NO_BOX * look.selection.fallback)
            for place, reason, look in zip(located, answered, looks, strict=True)
        ]

    def looks(
        self, vlm: SparseVLM, queries: Sequence[Query], responses: Sequence[Response], watch: Stopwatch
    ) -> list[Look]:
        with watch.stage("sparsify"):
            kept = [vlm.select(q, response) for q, response in zip(queries, responses, strict=True)]
            prompts = vlm.reason_prompts(queries, kept)
        grids = [query.scan.visuals[0].grid for query in queries]
        return [Look(*parts) for parts in zip(prompts, grids, kept, strict=True)]


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
        everything = [_everything(query) for query in queries]
        return [
            Outcome(None, reason, grid, selection.mask)
            for reason, (grid, selection) in zip(answered, everything, strict=True)
        ]

    def looks(
        self, vlm: SparseVLM, queries: Sequence[Query], responses: Sequence[Response], watch: Stopwatch
    ) -> list[Look]:
        """RL without pruning: localizations are written and rewarded, but nothing is left out."""
        prompts = vlm.reason_prompts(queries, [None] * len(queries))
        return [Look(prompt, *_everything(query)) for prompt, query in zip(prompts, queries, strict=True)]


def _everything(query: Query) -> tuple[TokenGrid, Selection]:
    grid = query.scan.visuals[0].grid
    return grid, Selection(np.ones(grid.num_tokens, dtype=bool))
