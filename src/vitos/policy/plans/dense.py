"""No localization: reason on all visual tokens. The reference that sparse answers are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from vitos.core.geometry import Box
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Plan, Reasoning
from vitos.policy.types import Query


class Dense(Plan):
    """In training this is RL without pruning: localizations are written and rewarded, but no token is left out."""

    drops = False
    localizes = False

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        whole = Reasoning(branches.reason_prompt(query), Kept.everything(query.grid))
        return [whole] * len(evidence)
