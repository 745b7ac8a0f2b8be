"""The paper's plan: localize on all visual tokens, keep those in the boxes, reason from a new prompt of the kept ones.

    dense prompt ─► localize ─► boxes ─► keep, fuse ─► sparse prompt ─► reason ─► answer

The three lines of `reason` below are the method; `Plan.steps` calls it between the two branches.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitos.core.geometry import Box
from vitos.core.prompt import Prompt
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Plan, Reasoning
from vitos.policy.types import Query


class TwoPass(Plan):
    """Outside tokens are fused into the kept ones by the spec's fusion; kept tokens stay at their dense positions."""

    trainable = True
    takes_masks = True

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        dense = branches.reason_prompt(query)
        kept = [branches.keep(query, boxes) for boxes in evidence]
        return [Reasoning(self.thinned(branches, query, dense, one), one) for one in kept]

    def prompt(self, branches: Branches, query: Query, kept: Kept, dense: Prompt | None = None) -> Prompt:
        return self.thinned(branches, query, dense or branches.reason_prompt(query), kept)

    def thinned(self, branches: Branches, query: Query, dense: Prompt, kept: Kept) -> Prompt:
        """The dense prompt with the kept visual tokens only."""
        return branches.sparse(query, dense, kept)
