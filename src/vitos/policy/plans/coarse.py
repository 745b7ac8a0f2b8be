"""Localize on the image at half its width and height; encode the evidence alone at full resolution.

The cells of the evidence are encoded in rectangles, each without the rest of the image, and keep their positions; of
several images, those without evidence are not encoded again. If
no box could be read, or a box is smaller than a cell of the reduced image, the boxes cannot be trusted. Then training
reasons on the whole image at full resolution, and inference localizes again on that (`two_pass`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from vitos.backbones.base import Backbone
from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.prompt import VisualTokens
from vitos.core.sparsify import Fusion, Kept, cell_rectangles, select
from vitos.core.stopwatch import Stopwatch
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Limits, Outcome, Plan, Reasoning, Steps, evidence_of, reasoned
from vitos.policy.plans.two_pass import TwoPass
from vitos.policy.types import Query


class Coarse(Plan):
    """Saves work in the vision encoder, too; for families that see images at any resolution."""

    reduced = True
    needs_pictures = True
    trainable = True
    timed_as = "vision"

    def refusal(self, backbone: Backbone) -> str:
        if backbone.capabilities.any_resolution:
            return ""
        return (
            f"{type(backbone).__name__} sees every image at one resolution, so plan {self.name} would save nothing; "
            "use gather, two_pass, dense or crop"
        )

    def visuals(self, branches: Branches, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        with torch.no_grad():
            return tuple(branches.backbone.encode_reduced(picture) for picture in pictures)

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        problems = [_problem(query, boxes) for boxes in evidence]
        whole = _whole(branches, query, watch) if any(problems) else query
        dense = branches.reason_prompt(whole) if any(problems) else None
        return [
            Reasoning(dense, Kept.everything(whole.grid, problem))
            if problem and dense is not None
            else at_full_resolution(branches, query, partial(select, boxes=boxes, rule=branches.spec.keep), watch)
            for problem, boxes in zip(problems, evidence, strict=True)
        ]

    def steps(self, branches: Branches, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        localizations = yield from self.localized(branches, queries, limits)
        evidence = [evidence_of(query, rollout) for query, rollout in zip(queries, localizations, strict=True)]
        problems = [_problem(query, boxes) for query, boxes in zip(queries, evidence, strict=True)]
        outcomes: dict[int, Outcome] = {}
        if seen := [i for i, problem in enumerate(problems) if not problem]:
            with watch.span("vision"):
                ready = [self.reason(branches, queries[i], [evidence[i]], watch)[0] for i in seen]
            prompts = [one.prompt for one in ready]
            answered = yield from reasoned(branches, [queries[i] for i in seen], prompts, limits)
            for i, one, rollout in zip(seen, ready, answered, strict=True):
                outcomes[i] = Outcome(
                    localization=localizations[i], reasoning=rollout, boxes=evidence[i], kept=one.kept
                )
        if missed := [i for i, problem in enumerate(problems) if problem]:
            with watch.span("vision"):
                again = [_whole(branches, queries[i], watch) for i in missed]
            found = yield from TwoPass(self.name).steps(branches, again, limits, watch)
            for i, outcome in zip(missed, found, strict=True):
                done = "was localized on again" if queries[i].boxes is None else "was used"
                note = f"{problems[i]}; the image {done} at full resolution"
                why_not = "; ".join(filter(None, (note, outcome.kept.why_not)))
                outcomes[i] = replace(outcome, kept=replace(outcome.kept, why_not=why_not))
        return [outcomes[i] for i in range(len(queries))]


def _problem(query: Query, boxes: Sequence[Box]) -> str:
    """Reason why boxes of the reduced image cannot be trusted; empty if they can."""
    if not boxes:
        return "no box could be read from the reduced image"
    for grid, own in query.grid.by_image(boxes):
        (view,) = grid.views
        x, y = view.edges()
        if any(b.x2 - b.x1 < x[1] - x[0] or b.y2 - b.y1 < y[1] - y[0] for b in own):
            return "a box is smaller than a cell of the reduced image"
    return ""


def _whole(branches: Branches, query: Query, watch: Stopwatch) -> Query:
    """The same question about its images at full resolution."""
    scan = branches.encode_many([query.scan.pictures])[0]
    if query.scan.images:
        scan = scan.of_files(query.scan.images)
    watch.count("vision", sum(visual.grid.num_tokens for visual in scan.visuals))
    return replace(query, scan=scan)


def at_full_resolution(
    branches: Branches, query: Query, choose: Callable[[TokenGrid], Kept], watch: Stopwatch, *, only: bool = False
) -> Reasoning:
    """The cells of the evidence, in the grids of the whole images; the other cells are dropped, positions kept.

    Args:
        branches: the model and its prompts.
        query: the question about the reduced images.
        choose: what to keep, given the grid of all images at full resolution.
        watch: a stopwatch that counts encoded tokens.
        only: whether cells that were not chosen, but are encoded to fill a rectangle, are dropped again.
    """
    scan = query.scan
    laid = [branches.backbone.layout(picture) for picture in scan.pictures]
    grids = [grid.within(small.grid.shown) for (grid, _), small in zip(laid, scan.visuals, strict=True)]
    chosen = choose(TokenGrid.joined(grids))
    visuals, masks = [], []
    for picture, one, (_, resized), small in zip(scan.pictures, chosen.images, laid, scan.visuals, strict=True):
        visual, mask = _cells(branches, picture, one, small)
        visuals.append(replace(visual, resized=resized))
        masks.append(mask)
        watch.count("vision", int(mask.sum()))
    placed = replace(query, scan=replace(scan, visuals=tuple(visuals), prefix=None))
    kept = Kept(placed.grid, chosen.mask if only else np.concatenate(masks), scores=chosen.scores)
    return Reasoning(branches.sparse(placed, branches.reason_prompt(placed), kept, Fusion("none")), kept)


def _cells(
    branches: Branches, picture: Image.Image, wanted: Kept, small: VisualTokens
) -> tuple[VisualTokens, BoolArray]:
    """The wanted cells of one image in its grid, zeros elsewhere, and the mask of the cells that were encoded."""
    (view,) = wanted.grid.views
    mask = np.zeros((view.rows, view.cols), dtype=bool)
    tensors = [t.new_zeros(wanted.grid.num_tokens, t.shape[1]) for t in small.tensors]
    if wanted.count:
        rectangles = cell_rectangles(wanted.grid, wanted.mask)
        with torch.no_grad():
            cells = branches.backbone.encode_cells(picture, rectangles)
        index = []
        for top, left, bottom, right in rectangles:
            mask[top:bottom, left:right] = True
            index.append(np.arange(mask.size).reshape(mask.shape)[top:bottom, left:right].ravel())
        places = torch.from_numpy(np.concatenate(index)).to(cells[0].device)
        tensors = [t.index_copy(0, places, part) for t, part in zip(tensors, cells, strict=True)]
    visual = VisualTokens(tensors[0], wanted.grid, resized=small.resized, streams=tuple(tensors[1:]))
    return visual, mask.ravel()
