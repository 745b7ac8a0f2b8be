"""Localize on all visual tokens, then go on behind the keys and values of the kept ones; the image runs once for both.

Nothing is fused: the kept tokens' keys and values have seen the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitos.backbones.base import Backbone
from vitos.config.recipe import Recipe
from vitos.core.prompt import Prompt
from vitos.core.sparsify import Kept
from vitos.policy.branches import Branches
from vitos.policy.plans.two_pass import TwoPass
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query


class Gather(TwoPass):
    """`two_pass` on prompts that hide the dropped tokens from everything behind the image."""

    shares_prefix = True
    no_vllm = "cannot hide tokens that have run, as sparsify.plan: gather does"

    def refusal(self, backbone: Backbone) -> str:
        return backbone.cache_refusal

    def spec_problem(self, spec: VitosSpec) -> str:
        if spec.positions == "renumber":
            return "positions: renumber has no effect on keys that are written already (plan gather); use keep"
        first, second = spec.localize_text("\0").partition("\0")[0], spec.reason_text("\0").partition("\0")[0]
        if first != second:
            return (
                "plan gather goes on behind the image that localization saw: localize_prompt and reason_prompt must "
                f"begin alike up to {{question}}, got {first!r} and {second!r}"
            )
        return ""

    def recipe_problems(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        yield from super().recipe_problems(recipe)
        if recipe.sparsify.positions == "renumber":
            yield "sparsify.positions", "has no effect with plan gather, whose keys are written already; use keep"

    def thinned(self, branches: Branches, query: Query, dense: Prompt, kept: Kept) -> Prompt:
        return dense if kept.all else dense.gather(branches.masks(query, kept))
