"""One question answered three ways: from all visual tokens, from those of the evidence, from as many random ones.

What the demo shows, without its user interface. The evidence is the model's own, or boxes that a person gives; then
nothing is localized, and the plan goes on from these boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vitos.core.geometry import Box
from vitos.core.masks import random_mask
from vitos.core.registry import PLANS
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import derive_seed
from vitos.policy.plans import Limits, get_plan
from vitos.policy.types import Finding, Query, Scan, tokens_read, tokens_written
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
        kept = self.finding.kept
        return f"{kept.count} of {kept.mask.size} tokens ({kept.ratio:.0%})"

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


# --- answering ------------------------------------------------------------------------------------------------------


def look(
    vlm: SparseVLM,
    image: Path,
    question: str,
    plan: str,
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
    session = _Session(vlm, image, question, limits)
    dense, sparse = session.dense(), session.planned(plan, budget, boxes)
    by = plan if get_plan(plan).takes_masks else "two_pass"
    random = session.random(by, sparse.finding.kept.count, seed)
    notes = _notes([sparse], boxes)
    if by != plan:
        notes.append(f"Plan {plan} encodes the image twice; the random tokens are answered from by two_pass.")
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
    planned = [session.planned(plan, budget if get_plan(plan).takes_masks else 0.0, boxes) for plan in plans]
    notes = _notes(planned, boxes)
    if budget and (without := [plan for plan in plans if not get_plan(plan).takes_masks]):
        notes.append(f"The budget does not apply to {' and '.join(without)}, which encode the image twice.")
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
        return self._answered("dense", "dense")

    def planned(self, plan: str, budget: float, boxes: Sequence[Box]) -> Look:
        if not get_plan(plan).localizes:
            raise ValueError(f"{plan} is always shown; choose another plan to compare it with")
        return self._answered("sparse", plan, tuple(boxes) or None, budget or None)

    def random(self, plan: str, count: int, seed: int) -> Look:
        return self._answered("random", plan, random=(count, seed))

    def _answered(
        self,
        name: str,
        plan: str,
        boxes: tuple[Box, ...] | None = None,
        budget: float | None = None,
        random: tuple[int, int] | None = None,
    ) -> Look:
        """Answer by a plan, from `random` tokens (their number and a seed) where they are given."""
        scan, cost = self._scan(plan)
        query = Query.about(scan, self.question, boxes=boxes, budget=budget)
        if random is not None:
            rng = np.random.default_rng(derive_seed(random[1], "random", query.question))
            query = replace(query, tokens=random_mask(query.grid, random[0], rng))
        (finding,) = self.vlm.answer([query], plan=plan, limits=self.limits)
        finding = finding.with_encoding(cost)
        picture = draw_overlay(self.shown, finding.grid, finding.kept.mask, finding.boxes)
        return Look(name, finding, picture)

    def _scan(self, plan: str) -> tuple[Scan, Stopwatch]:
        reduced = get_plan(plan).reduced
        if reduced not in self._scans:
            watch = Stopwatch()
            scan = self.vlm.encode(self.picture, plan=plan, watch=watch).of_files([self.facts])
            self._scans[reduced] = scan, watch
        return self._scans[reduced]


def _notes(looks: Sequence[Look], boxes: Sequence[Box]) -> list[str]:
    notes = ["Your boxes were used; the model did not localize."] if boxes else []
    findings = [look.finding for look in looks]
    return notes + [f"Plan {f.plan} fell back: {f.fallback_reason}." for f in findings if f.fallback]


def plans_of(vlm: SparseVLM) -> tuple[list[str], list[str]]:
    """The plans with a localization that a model can follow, its own first, and why it refuses the others."""
    known = [get_plan(name) for name in PLANS.names()]
    plans = sorted((plan for plan in known if plan.localizes), key=lambda plan: plan.name != vlm.spec.plan)
    refusals = {plan.name: plan.refusal(vlm.backbone) for plan in plans}
    return [name for name, why in refusals.items() if not why], [f"{n}: {why}" for n, why in refusals.items() if why]
