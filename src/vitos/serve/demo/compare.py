"""One question answered in several ways: from all visual tokens, from those of the evidence, from random ones.

This is what the demo shows, without its user interface. The evidence is the model's own, or boxes that a person gives;
then nothing is localized, and the plan goes on from these boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitos.core.geometry import Box
from vitos.core.masks import random_mask
from vitos.core.registry import PLANS
from vitos.core.sparsify import Kept, rectangles
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import derive_seed
from vitos.policy.plans import Limits, get_plan
from vitos.policy.types import Finding, Query, Scan
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import draw_overlay
from vitos.serve.demo.inputs import checked_question, fitting, open_image

BOXES, SCORES, RECTANGLES = "boxes", "scores", "rectangles"
"""What may be drawn on a picture besides the kept cells: boxes that were written or given, the scores of an evidence
head, and the smallest rectangles around the kept cells."""
DRAWN = (BOXES, SCORES)
"""What is drawn unless something else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedAnswer:
    """One of the answers that are compared.

    Attributes:
        title: "Dense", or what the tokens are and the plan, such as "Sparse (gather)".
        finding: the answer. Its seconds and tokens include those of encoding the image ("vision", "prefix"), as if it
            were the only answer.
        shown: the images, RGB.
        given: whether its boxes are a person's.
    """

    title: str
    finding: Finding
    shown: tuple[Image.Image, ...]
    given: bool = False

    @property
    def kept(self) -> str:
        """Tokens kept, such as "6 of 64 tokens (9%)"."""
        kept = self.finding.kept
        return f"{kept.count} of {kept.mask.size} tokens ({kept.ratio:.0%})"

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes that the model wrote or a person gave; none if they only frame what an evidence head kept."""
        return self.finding.boxes if self.given or self.finding.localization is not None else ()

    @property
    def seconds(self) -> tuple[float, float, float, float]:
        """Seconds to encode the image, to localize the evidence, to leave tokens out, and to reason.

        Encoding is the vision encoder, and the language model on what comes before and in the image. The first layers
        of plan one_pass, whose head localizes, count as localizing.
        """
        spans = self.finding.seconds

        def total(*starts: str) -> float:
            return sum(value for name, value in spans.items() if name.startswith(starts))

        encode, localize, reason = total("vision", "prefix"), total("localize", "early"), total("reason")
        return encode, localize, sum(spans.values()) - encode - localize - reason, reason

    def picture(self, place: int = 1, draw: Collection[str] = DRAWN, *, cells: bool = True) -> Image.Image:
        """One of the images, kept tokens bright, with what is to be drawn on top, RGB.

        Args:
            place: place of the image, from 1.
            draw: what to draw, of `BOXES`, `SCORES` and `RECTANGLES`.
            cells: whether the other tokens are dark.
        """
        kept, grid = self.finding.kept, self.finding.grid.images[place - 1]
        own = Kept(grid, self.finding.grid.split(kept.mask)[place - 1])
        boxes = [box for box in self.boxes if BOXES in draw and box.image == place]
        if RECTANGLES in draw and not kept.all:
            boxes += rectangles(own)
        scores = None
        if SCORES in draw and kept.scores is not None:
            scores = self.finding.grid.split(_shares(kept.scores))[place - 1]
        return draw_overlay(self.shown[place - 1], grid, own.mask if cells else None, boxes, scores=scores)


def _shares(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probability of evidence by the scores of a head, divided by the highest, in (0, 1]."""
    likely = 1 / (1 + np.exp(-scores.astype(np.float64)))
    return np.asarray(likely / likely.max())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several answers to one question.

    Attributes:
        answers: dense, sparse and random; or dense, and sparse by each plan.
        notes: what a reader must know to compare them fairly, a sentence each.
    """

    answers: tuple[ComparedAnswer, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ComparedAnswer]:
        return iter(self.answers)


# --- answering ------------------------------------------------------------------------------------------------------


def compare(
    vlm: SparseVLM,
    images: Sequence[Path],
    question: str,
    plan: str,
    *,
    lead: str = "",
    budget: float = 0.0,
    boxes: Sequence[Box] = (),
    seed: int = 0,
    limits: Limits = Limits(),
) -> Comparison:
    """Answer a question densely, by a plan, and from as many random tokens as the plan kept.

    Random tokens follow the same plan. A plan that encodes the image twice cannot be told which tokens to keep; then
    they follow two_pass.

    Args:
        images: files with their selectors, as `load_image_facts` takes them; no crop.
        question: the question with its options, if it has any.
        plan: any plan that leaves visual tokens out.
        lead: text in front of the question; see `Scan`.
        budget: share of the visual tokens, 0..1; 0: the cells of the boxes as the checkpoint's keep rule says.
        boxes: a person's evidence instead of the model's.
        seed: seed of the random tokens.

    Raises:
        ValueError: for an empty question, a budget that is out of range or that the plan cannot keep, a plan that the
            family cannot follow, or a file that cannot be read (`ImageError`).
    """
    session = _Session(vlm, images, question, lead, limits)
    if not get_plan(plan).drops:
        raise ValueError(f"{plan} is always shown; choose another plan to compare it with")
    dense, sparse = session.dense(), session.sparse(plan, boxes, budget)
    notes = _notes([sparse], boxes)
    by = plan if get_plan(plan).takes_masks else "two_pass"
    if by != plan:
        notes.append(f"Plan {plan} encodes the image twice; the random tokens are answered from by two_pass.")
    return Comparison((dense, sparse, session.random(by, sparse.finding.kept.count, seed)), tuple(notes))


def compare_plans(
    vlm: SparseVLM,
    images: Sequence[Path],
    question: str,
    *,
    lead: str = "",
    budget: float = 0.0,
    boxes: Sequence[Box] = (),
    limits: Limits = Limits(),
) -> Comparison:
    """Answer a question densely and by each plan that the model can follow; as `compare`, without random tokens.

    The budget holds for the plans that can keep one; the others keep the boxes as they are.
    """
    session = _Session(vlm, images, question, lead, limits)
    plans = plans_of(vlm)[0]
    without = [plan for plan in plans if budget and not session.takes_budget(plan, budget)]
    answers = [session.sparse(plan, boxes, 0.0 if plan in without else budget) for plan in plans]
    notes = _notes(answers, boxes)
    if without:
        notes.append(f"The budget does not apply to {' and '.join(without)}, which encode the image twice.")
    return Comparison((session.dense(), *answers), tuple(notes))


class _Session:
    """Some images and one question; the images are encoded once for all plans that can share it."""

    def __init__(self, vlm: SparseVLM, images: Sequence[Path], question: str, lead: str, limits: Limits) -> None:
        self._vlm, self._limits, self._lead = vlm, limits, lead
        self._question = checked_question(question, len(images))
        opened = [open_image(image) for image in images]
        self._pictures, self._facts = zip(*opened, strict=True)
        self._shown = tuple(map(fitting, self._pictures))
        self._scans: dict[tuple[bool, int | None], tuple[Scan, Stopwatch]] = {}

    def dense(self) -> ComparedAnswer:
        return self._answer("Dense", "dense", Query.about(self._scan("dense")[0], self._question))

    def sparse(self, plan: str, boxes: Sequence[Box], budget: float) -> ComparedAnswer:
        given = tuple(boxes) or None
        query = Query.about(self._scan(plan)[0], self._question, boxes=given, budget=budget or None)
        return self._answer(f"Sparse ({plan})", plan, query)

    def takes_budget(self, plan: str, budget: float) -> bool:
        """Whether the plan can keep a share of the tokens that is given."""
        query = Query.about(self._scan(plan)[0], self._question, budget=budget)
        return not get_plan(plan).question_problem(query)

    def random(self, plan: str, count: int, seed: int) -> ComparedAnswer:
        query = Query.about(self._scan(plan)[0], self._question)
        tokens = random_mask(query.grid, count, np.random.default_rng(derive_seed(seed, "random", query.question)))
        return self._answer(f"Random ({plan})", plan, replace(query, tokens=tokens))

    def _answer(self, title: str, plan: str, query: Query) -> ComparedAnswer:
        (finding,) = self._vlm.answer([query], plan=plan, limits=self._limits)
        full = finding.with_encoding(self._scan(plan)[1])
        return ComparedAnswer(title=title, finding=full, shown=self._shown, given=query.boxes is not None)

    def _scan(self, plan: str) -> tuple[Scan, Stopwatch]:
        """The images encoded for a plan, and what that cost."""
        key = (get_plan(plan).reduced, get_plan(plan).shared_layers(self._vlm.spec))
        if key not in self._scans:
            watch = Stopwatch()
            scan = self._vlm.encode(*self._pictures, plan=plan, lead=self._lead, watch=watch).of_files(self._facts)
            self._scans[key] = scan, watch
        return self._scans[key]


def _notes(answers: Sequence[ComparedAnswer], boxes: Sequence[Box]) -> list[str]:
    notes = ["Your boxes were used; the model did not localize."] if boxes else []
    findings = [answer.finding for answer in answers]
    return notes + [f"Plan {f.plan} fell back: {f.fallback_reason}." for f in findings if f.fallback]


def plans_of(vlm: SparseVLM) -> tuple[list[str], list[str]]:
    """The plans that leave tokens out and that a model can follow, its own first; why it cannot follow others."""
    known = [get_plan(name) for name in PLANS.names()]
    plans = sorted((plan for plan in known if plan.drops), key=lambda plan: plan.name != vlm.spec.plan)
    refusals = {plan.name: plan.refusal(vlm.backbone) for plan in plans}
    return [name for name, why in refusals.items() if not why], [f"{n}: {why}" for n, why in refusals.items() if why]
