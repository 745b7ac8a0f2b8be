"""Find the evidence inside the one and only pass: a head scores visual tokens after layer k, and the others leave.

    all tokens ─► layers 1..k ─► evidence head ─► kept ones ─► layers k+1..L ─► answer

No boxes are written and nothing runs twice. The head (`backbones/evidence_head.py`) is trained by `vitos distill`; a
question with boxes, or with the tokens to keep, needs none of its scores. `Finding.boxes` are the smallest rectangles
around the kept cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from vitos.backbones.base import Backbone
from vitos.config.recipe import Recipe
from vitos.core.geometry import Box, TokenGrid
from vitos.core.prompt import Prompt
from vitos.core.response import Response
from vitos.core.sparsify import Kept, best_cells, rectangles
from vitos.core.stopwatch import Stopwatch
from vitos.engines.draws import CellPrompt, head_scores
from vitos.engines.in_flight import run_early
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Limits, Plan, Reasoning, Steps
from vitos.policy.prefixes import with_prefixes
from vitos.policy.spec import HeadRule, VitosSpec
from vitos.policy.types import Query, Rollout


class OnePass(Plan):
    """Kept tokens have seen the others in the first layers, so nothing is fused into them."""

    localizes = False
    takes_masks = True
    trainable = True
    no_vllm = "cannot drop tokens inside the pass, where the evidence head of plan one_pass draws cells"

    def refusal(self, backbone: Backbone) -> str:
        head = backbone.evidence_head
        if head is None:
            return (
                f"the checkpoint has no evidence head, which plan {self.name} needs; train one with `vitos distill "
                f"--plan {self.name}`"
            )
        if head.plans and self.name not in head.plans:
            return (
                f"the checkpoint's evidence head was trained for plan {' and '.join(head.plans)}, not {self.name}; "
                f"train one with `vitos distill --plan {self.name}`"
            )
        return ""

    def spec_problem(self, spec: VitosSpec) -> str:
        if spec.positions == "renumber":
            return "positions: renumber has no effect on tokens that have run already (plan one_pass); use keep"
        return ""

    def recipe_problems(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        yield from super().recipe_problems(recipe)
        why = "the evidence head of plan one_pass draws cells inside the pass"
        if recipe.train.schedule == "dense":
            yield "train.schedule", f"dense reasons on whole images, but {why}; set plan two_pass"
        if recipe.evaluate.budgets and recipe.data.eval:
            yield "evaluate.budgets", "cut or widen boxes, and plan one_pass writes none; set them to []"
        if recipe.sparsify.positions == "renumber":
            yield "sparsify.positions", "has no effect with plan one_pass, whose tokens have run already; use keep"

    def question_problem(self, query: Query) -> str:
        if query.scan.reduced:
            return f'the scan was made for another plan than {self.name}; use encode(…, plan="{self.name}")'
        return ""

    def shared_layers(self, spec: VitosSpec) -> int | None:
        return _rule(spec).after

    def prepare(
        self, branches: Branches, engine: TorchEngine, queries: Sequence[Query], watch: Stopwatch
    ) -> Sequence[Query]:
        """Run the first layers of each prompt and score its visual tokens (span "early_prefill")."""
        asked = [i for i, query in enumerate(queries) if query.boxes is None and query.tokens is None]
        shared = _sharing(branches, engine, [queries[i] for i in asked], watch)
        layers, out = _rule(branches.spec).after, list(queries)
        prompts = [replace(branches.reason_prompt(query), after=layers) for query in shared]
        prefixes = branches.known_prefixes(shared, prompts)
        with watch.span("early_prefill"):
            early = run_early(engine, prompts, prefixes, layers)
            for i, query, prompt, run in zip(asked, shared, prompts, early, strict=True):
                scores = head_scores(branches.backbone, prompt, run.states, query.grid.num_tokens)
                out[i] = replace(query, scan=replace(query.scan, prefix=run), scores=scores.detach().cpu().numpy())
        ran = sum(len(p) - (len(x) if x else 0) for p, x in zip(prompts, prefixes, strict=True))
        watch.count("early_prefill", ran)
        return out

    def evidence_prompt(self, branches: Branches, query: Query) -> Prompt:
        """The prompt of the head, which is completed by cells in place of text (`engines/draws.py`)."""
        rule, cells = _rule(branches.spec), query.grid.num_tokens
        count = max(branches.spec.keep.min_tokens, round(rule.keep * cells))
        return CellPrompt.of(
            branches.reason_prompt(query), after=rule.after, cells=cells, count=min(cells, max(1, count))
        )

    def read_evidence(self, branches: Branches, query: Query, rollout: Rollout) -> Rollout:
        """The draw of cells, with the smallest rectangles around them as boxes."""
        boxes = rectangles(self._drawn(query, rollout))
        text = branches.evidence_text(query.question, query.scan.visuals, boxes)
        response = Response(f"<evidence>{text}</evidence>", None, boxes, None, well_formed=True)
        return replace(rollout, response=response)

    def reason_after(
        self, branches: Branches, query: Query, rollouts: Sequence[Rollout], watch: Stopwatch
    ) -> list[Reasoning]:
        dense = branches.reason_prompt(query)
        kept = [self._drawn(query, rollout) for rollout in rollouts]
        return [Reasoning(self.prompt(branches, query, one, dense), one) for one in kept]

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        dense = branches.reason_prompt(query)
        kept = [self._keep(branches, query, boxes) for boxes in evidence]
        return [Reasoning(self.prompt(branches, query, one, dense), one) for one in kept]

    def prompt(self, branches: Branches, query: Query, kept: Kept, dense: Prompt | None = None) -> Prompt:
        whole = dense or branches.reason_prompt(query)
        return whole.prune(branches.masks(query, kept), _rule(branches.spec).after)

    def steps(self, branches: Branches, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        outcomes = yield from super().steps(branches, queries, limits, watch)
        return [replace(one, boxes=one.boxes or rectangles(one.kept)) for one in outcomes]

    @staticmethod
    def _drawn(query: Query, rollout: Rollout) -> Kept:
        mask = np.zeros(query.grid.num_tokens, dtype=bool)
        mask[rollout.completion.token_ids.numpy()] = True
        return Kept(query.grid, mask, scores=query.scores)

    @staticmethod
    def _keep(branches: Branches, query: Query, boxes: Sequence[Box]) -> Kept:
        """What the question says to keep; else the tokens of highest score, by budget, share or threshold."""
        if query.tokens is not None or boxes:
            return branches.keep(query, boxes)
        return best_of(branches.spec, query.grid, query.scores, query.budget)


def best_of(spec: VitosSpec, grid: TokenGrid, scores: NDArray[np.float32] | None, budget: float | None) -> Kept:
    """The tokens of highest score, by a budget, else by the share or threshold of the head's rule."""
    if scores is None:
        raise ValueError("the evidence head has not read the question; this is a bug, please report it")
    rule, total = _rule(spec), grid.num_tokens
    count = round((budget or rule.keep) * total)
    if budget is None and rule.threshold is not None:
        count = int((torch.from_numpy(scores).sigmoid() > rule.threshold).sum())
    least = 1 if budget is not None else spec.keep.min_tokens
    return best_cells(grid, scores, min(total, max(count, least)))


def _rule(spec: VitosSpec) -> HeadRule:
    if spec.evidence_head is None:
        raise ValueError("vitos.json does not say how to use an evidence head; train one with `vitos distill`")
    return spec.evidence_head


def _sharing(branches: Branches, engine: TorchEngine, queries: Sequence[Query], watch: Stopwatch) -> Sequence[Query]:
    """The questions, with the first layers of their image run once if there are several about it."""
    counts = Counter(query.scan for query in queries)
    several = [i for i, query in enumerate(queries) if counts[query.scan] > 1]
    if not several or branches.backbone.cache_refusal:
        return queries
    layers, out = _rule(branches.spec).after, list(queries)
    for i, query in zip(
        several, with_prefixes(branches, engine, [queries[i] for i in several], watch, layers), strict=True
    ):
        out[i] = query
    return out
