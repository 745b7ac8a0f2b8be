"""One question answered three ways: from all visual tokens, from those of the evidence, from as many random ones.

What the demo shows, without its user interface. The evidence is the model's own, or boxes that a person gives; then
nothing is localized, and the plan goes on from these boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitos.core.geometry import Box
from vitos.core.masks import fit_budget, random_mask
from vitos.core.names import PlanName
from vitos.core.response import Response
from vitos.core.sparsify import Selection
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion, derive_seed
from vitos.policy.plans import AGAIN, PLANS, Limits, Request
from vitos.policy.types import Finding, Query, Rollout, Scan, tokens_read, tokens_written
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import draw_overlay
from vitos.serve.demo.inputs import checked_question, fitting, open_image


@dataclass(frozen=True, slots=True)
class Look:
    """One way to look at the image, and what came of it.

    Attributes:
        name: "dense", "sparse" or "random".
        finding: the answer; its `boxes` are the model's, or the person's. Its seconds and tokens hold those of
            encoding the image ("vision", "prefix"), which each way would need on its own.
        picture: the image, kept tokens bright, boxes on top, RGB.
    """

    name: str
    finding: Finding
    picture: Image.Image

    @property
    def seconds(self) -> dict[str, float]:
        return self.finding.seconds

    @property
    def tokens(self) -> dict[str, int]:
        return self.finding.tokens

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
        return tokens_read(self.tokens)

    @property
    def tokens_written(self) -> int:
        return tokens_written(self.tokens)


@dataclass(frozen=True, slots=True)
class Looks:
    """Several ways beside one another, dense first.

    Attributes:
        ways: dense, sparse and random; or dense and every plan.
        notes: what a reader must know to compare them fairly, a sentence each.
    """

    ways: tuple[Look, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Look]:
        return iter(self.ways)

    @property
    def sparse(self) -> Look:
        """The plan's look; of several the first."""
        return next(way for way in self.ways if way.name == "sparse")


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
    if budget and plan in AGAIN:
        raise ValueError(
            f"A budget chooses among the tokens of one look at the image, and plan {plan} has two. Set the budget to "
            "0, or choose two_pass or gather."
        )
    session = _Session(vlm, image, question, limits)
    dense, sparse = session.dense(), session.planned(plan, budget, boxes)
    by: PlanName = "two_pass" if plan in AGAIN else plan
    random = session.random(by, int(sparse.finding.kept.sum()), seed)
    notes = _notes([sparse], boxes)
    if by != plan:
        notes.append(f"Plan {plan} looks at the image twice; the random tokens are taken from one look, by two_pass.")
    return Looks((dense, sparse, random), tuple(notes))


def look_by_all(
    vlm: SparseVLM,
    image: Path,
    question: str,
    *,
    budget: float = 0.0,
    boxes: Sequence[Box] = (),
    limits: Limits = Limits(),
) -> Looks:
    """Answer a question densely and by every plan that the model can follow; as `look`, without random tokens.

    The budget is that of two_pass and gather; coarse and crop keep the boxes as they are.
    """
    session = _Session(vlm, image, question, limits)
    plans = plans_of(vlm)[0]
    planned = [session.planned(plan, 0.0 if plan in AGAIN else budget, boxes) for plan in plans]
    notes = _notes(planned, boxes)
    if budget and any(plan in AGAIN for plan in plans):
        notes.append("The budget does not apply to coarse and crop, which look at the image twice.")
    return Looks((session.dense(), *planned), tuple(notes))


class _Session:
    """One image and one question; the image is encoded once for every plan that can share it."""

    def __init__(self, vlm: SparseVLM, image: Path, question: str, limits: Limits) -> None:
        self.vlm, self.limits = vlm, limits
        self.question = checked_question(question)
        self.picture, self.facts = open_image(image)
        self.shown = fitting(self.picture)
        self._scans: dict[bool, tuple[Scan, Stopwatch]] = {}

    def dense(self) -> Look:
        return self._answered("dense", self.vlm, "dense")

    def planned(self, plan: PlanName, budget: float, boxes: Sequence[Box]) -> Look:
        if not 0 <= budget <= 1:
            raise ValueError(f"the budget is a share of the tokens, 0 to 1, got {budget}")
        if plan == "dense":
            raise ValueError("dense is always shown beside the plan; choose another")
        return self._answered("sparse", Guided(self.vlm, tuple(boxes) or None, budget), plan)

    def random(self, plan: PlanName, count: int, seed: int) -> Look:
        return self._answered("random", Guided(self.vlm, (), random_count=count, seed=seed), plan)

    def _answered(self, name: str, policy: SparseVLM, plan: PlanName) -> Look:
        scan, cost = self._scan(plan)
        finding = policy.ask(scan, self.question, plan=plan, limits=self.limits).with_encoding(cost)
        picture = draw_overlay(self.shown, finding.grid, finding.kept, finding.boxes)
        return Look(name, finding, picture)

    def _scan(self, plan: PlanName) -> tuple[Scan, Stopwatch]:
        reduced = plan == "coarse"
        if reduced not in self._scans:
            watch = Stopwatch()
            scan = self.vlm.encode(self.picture, plan=plan, watch=watch).of_files([self.facts])
            self._scans[reduced] = scan, watch
        return self._scans[reduced]


def _notes(looks: Sequence[Look], boxes: Sequence[Box]) -> list[str]:
    notes = ["Your boxes were used; the model did not localize."] if boxes else []
    for finding in (look.finding for look in looks):
        if finding.fallback and boxes:
            notes.append(f"Plan {finding.plan} looked at the whole image at full resolution: a box is small.")
        elif finding.fallback:
            notes.append(f"Plan {finding.plan} fell back: {finding.fallback_reason}.")
    return notes


def plans_of(vlm: SparseVLM) -> tuple[list[PlanName], list[str]]:
    """The plans that a model can follow beside dense, its own first, and why it refuses the others."""
    plans = sorted((p for name, p in PLANS.items() if name != "dense"), key=lambda p: p.name != vlm.spec.plan)
    refusals = {plan.name: plan.refusal(vlm.backbone) for plan in plans}
    return [name for name, why in refusals.items() if not why], [f"{n}: {why}" for n, why in refusals.items() if why]
