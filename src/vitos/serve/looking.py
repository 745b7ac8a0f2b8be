"""One question answered three ways: from all visual tokens, from those of the evidence, from as many random ones.

What the demo shows, without its user interface. The evidence is the model's own, or boxes that a person gives; then
nothing is localized, and the plan goes on from these boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitos.benchmarks.controls import fit_budget, random_mask
from vitos.data.images import ImageFacts
from vitos.engines.base import Completion, derive_seed
from vitos.finding import Finding, Query, Rollout, Scan, Stopwatch
from vitos.geometry import Box
from vitos.plans import AGAIN, PLANS, Limits, Request
from vitos.policy import SparseVLM
from vitos.reports.overlay import draw_overlay
from vitos.response import Response
from vitos.serve.given import checked_question, fitting, open_image
from vitos.sparsify import Selection
from vitos.spec import PlanName


@dataclass(frozen=True, slots=True)
class Look:
    """One way to look at the image, and what came of it.

    Attributes:
        name: "dense", "sparse" or "random".
        finding: the answer; its `boxes` are the model's, or the person's.
        picture: the image, kept tokens bright, boxes on top, RGB.
        seconds, tokens: by stage as in `Finding`, with those of encoding the image ("vision", "prefix"), which each
            way would need on its own.
    """

    name: str
    finding: Finding
    picture: Image.Image
    seconds: dict[str, float]
    tokens: dict[str, int]

    @property
    def kept(self) -> str:
        """ "6 of 64 tokens (9%)"."""
        mask = self.finding.kept
        return f"{int(mask.sum())} of {mask.size} tokens ({mask.mean():.0%})"

    @property
    def encode_seconds(self) -> float:
        """Vision encoder, and the language model on what comes before and in the image."""
        return sum(value for name, value in self.seconds.items() if name in ("vision", "prefix"))

    @property
    def localize_seconds(self) -> float:
        """First pass of the language model, until the boxes are written."""
        return sum(value for name, value in self.seconds.items() if name.startswith("localize"))

    @property
    def reason_seconds(self) -> float:
        """Leaving tokens out, and the pass that answers."""
        return sum(self.seconds.values()) - self.encode_seconds - self.localize_seconds

    @property
    def tokens_read(self) -> int:
        """Text and visual tokens that the language model ran, the image's prefix included."""
        return sum(count for name, count in self.tokens.items() if name == "prefix" or name.endswith("_prefill"))

    @property
    def tokens_written(self) -> int:
        return sum(count for name, count in self.tokens.items() if name.endswith("_decode"))


@dataclass(frozen=True, slots=True)
class Looks:
    """The three ways beside one another.

    Attributes:
        notes: what a reader must know to compare them fairly, a sentence each.
    """

    dense: Look
    sparse: Look
    random: Look
    notes: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Look]:
        return iter((self.dense, self.sparse, self.random))


class Guided(SparseVLM):
    """The same model with its evidence given, or its number of tokens.

    Args:
        boxes: used instead of a localization, which is not run; None: the model localizes.
        budget: share of the image's tokens to which evidence is cut or widened; 0: the cells of the boxes.
        random_count: keep as many random tokens instead of evidence; needs `boxes=()`, so that nothing is localized.
        seed: of the random tokens.
    """

    def __init__(
        self,
        vlm: SparseVLM,
        boxes: tuple[Box, ...] | None = None,
        budget: float = 0.0,
        random_count: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(vlm.backbone, vlm.spec)
        self.engine = vlm.engine
        self.boxes, self.budget, self.random_count, self.seed = boxes, budget, random_count, seed

    def complete(self, request: Request, watch: Stopwatch) -> list[Completion]:
        """As ever, but where boxes are given the localization branch writes nothing."""
        if self.boxes is None or request.branch != "localize":
            return super().complete(request, watch)
        nothing = torch.empty(0, dtype=torch.long)
        return [Completion(nothing, torch.empty(0), "", finished=True) for _ in request.prompts]

    def read_localization(self, query: Query, completion: Completion) -> Rollout:
        """The boxes that were given, or those that the model wrote."""
        if self.boxes is None:
            return super().read_localization(query, completion)
        return Rollout(completion, Response("", None, self.boxes, None, well_formed=False))

    def select(self, query: Query, response: Response) -> Selection:
        """The tokens of the boxes, cut or widened to the budget; or random ones."""
        grid = query.scan.visuals[0].grid
        if self.random_count:
            rng = np.random.default_rng(derive_seed(self.seed, "random", query.question))
            return Selection(random_mask(grid, self.random_count, rng))
        selection = super().select(query, response)
        if not self.budget or selection.fallback:
            return selection
        return Selection(fit_budget(grid, response.boxes, max(1, round(self.budget * grid.num_tokens))))


# --- answering ------------------------------------------------------------------------------------------------------


def look(
    vlm: SparseVLM,
    image: Path,
    question: str,
    plan: PlanName,
    *,
    budget: float = 0.0,
    boxes: Sequence[Box] = (),
    seed: int = 0,
    limits: Limits = Limits(),
) -> Looks:
    """Answer a question densely, by a plan, and from random tokens in the number that the plan kept.

    Random tokens follow the same plan; under coarse and crop, which look at the image twice and so at more than a
    choice of tokens, they follow two_pass.

    Args:
        image: a file with its selector, as `load_image_facts` takes it; no crop.
        question: with its options, if it has any.
        plan: any but dense.
        budget: share of the visual tokens, 0..1; 0: the cells of the boxes as the checkpoint's keep rule says.
        boxes: a person's evidence instead of the model's.
        seed: of the random tokens.

    Raises:
        ValueError: for an empty question, a budget out of range or under a plan that looks twice, a plan that the
            family cannot follow, or a file that cannot be read (`ImageError`).
    """
    question = checked_question(question)
    if not 0 <= budget <= 1:
        raise ValueError(f"the budget is a share of the tokens, 0 to 1, got {budget}")
    if plan == "dense":
        raise ValueError("dense is always shown beside the plan; choose another")
    if budget and plan in AGAIN:
        raise ValueError(
            f"A budget chooses among the tokens of one look at the image, and plan {plan} has two. Set the budget to "
            "0, or choose two_pass or gather."
        )
    picture, facts = open_image(image)
    scan, cost = _encoded(vlm, picture, facts, plan)
    whole, whole_cost = _encoded(vlm, picture, facts, "dense") if scan.reduced else (scan, cost)
    shown = fitting(picture)

    dense = _looked("dense", vlm.ask(whole, question, plan="dense", limits=limits), shown, whole_cost)
    guided = Guided(vlm, tuple(boxes) or None, budget)
    sparse = _looked("sparse", guided.ask(scan, question, plan=plan, limits=limits), shown, cost)
    count, by = int(sparse.finding.kept.sum()), "two_pass" if plan in AGAIN else plan
    chance = Guided(vlm, (), random_count=count, seed=seed)
    random = _looked("random", chance.ask(whole, question, plan=by, limits=limits), shown, whole_cost)

    notes = []
    if boxes:
        notes.append("Your boxes were used; the model did not localize.")
    if sparse.finding.fallback and boxes:
        notes.append(f"Plan {plan} looked at the whole image at full resolution: a box is small.")
    elif sparse.finding.fallback:
        notes.append(f"Plan {plan} fell back: {sparse.finding.fallback_reason}.")
    if by != plan:
        notes.append(f"Plan {plan} looks at the image twice; the random tokens are taken from one look, by two_pass.")
    return Looks(dense, sparse, random, tuple(notes))


def _encoded(vlm: SparseVLM, picture: Image.Image, facts: ImageFacts, plan: PlanName) -> tuple[Scan, Stopwatch]:
    watch = Stopwatch()
    return vlm.encode(picture, plan=plan, watch=watch).of_files([facts]), watch


def _looked(name: str, finding: Finding, shown: Image.Image, cost: Stopwatch) -> Look:
    seconds, tokens = dict(cost.seconds), dict(cost.tokens)
    for stage, value in finding.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    for stage, count in finding.tokens.items():
        tokens[stage] = tokens.get(stage, 0) + count
    return Look(name, finding, draw_overlay(shown, finding.grid, finding.kept, finding.boxes), seconds, tokens)


def plans_of(vlm: SparseVLM) -> tuple[list[PlanName], list[str]]:
    """The plans that a model can follow beside dense, its own first, and why it refuses the others."""
    others = [plan for name, plan in PLANS.items() if name != "dense"]
    others.sort(key=lambda plan: plan.name != vlm.spec.plan)
    refusals = {plan.name: plan.refusal(vlm.backbone) for plan in others}
    return [p.name for p in others if not refusals[p.name]], [
        f"{name}: {why}" for name, why in refusals.items() if why
    ]
