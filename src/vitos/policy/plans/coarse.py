"""Localize on the image at half its width and height; encode the evidence alone at full resolution.

The cells of the evidence are encoded in rectangles, each without the rest of the image, and keep their positions. If
no box could be read, or a box is smaller than a cell of the reduced image, the boxes cannot be trusted. Then training
reasons on the whole image at full resolution, and inference localizes again on that (`two_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from vitos.backbones.base import Backbone
from vitos.core.geometry import Box
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
            f"{type(backbone).__name__} sees every image at one resolution, so plan coarse would save nothing; use "
            "gather, two_pass, dense or crop"
        )

    def visuals(self, branches: Branches, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        with torch.no_grad():
            return (branches.backbone.encode_reduced(pictures[0]), *branches.encode(pictures[1:]))

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        problems = [_problem(query, boxes) for boxes in evidence]
        whole = _whole(branches, query, watch) if any(problems) else query
        dense = branches.reason_prompt(whole) if any(problems) else None
        return [
            Reasoning(dense, Kept.everything(whole.grid, problem))
            if problem and dense is not None
            else _at_full_resolution(branches, query, boxes, watch)
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
    (view,) = query.grid.views
    if not boxes:
        return "no box could be read from the reduced image"
    x, y = view.edges()
    thin = any(b.x2 - b.x1 < x[1] - x[0] or b.y2 - b.y1 < y[1] - y[0] for b in boxes)
    return "a box is smaller than a cell of the reduced image" if thin else ""


def _whole(branches: Branches, query: Query, watch: Stopwatch) -> Query:
    """The same question about its images at full resolution."""
    scan = branches.encode_many([query.scan.pictures])[0]
    if query.scan.images:
        scan = scan.of_files(query.scan.images)
    watch.count("vision", sum(visual.grid.num_tokens for visual in scan.visuals))
    return replace(query, scan=scan)


def _at_full_resolution(branches: Branches, query: Query, boxes: Sequence[Box], watch: Stopwatch) -> Reasoning:
    """The cells of the evidence, in the grid of the whole image; the other cells are dropped, positions kept."""
    picture, others = query.scan.pictures[0], query.scan.visuals[1:]
    grid, resized = branches.backbone.layout(picture)
    grid = grid.within(query.grid.shown)
    rectangles = cell_rectangles(grid, select(grid, boxes, branches.spec.keep).mask)
    with torch.no_grad():
        cells, *streams = branches.backbone.encode_cells(picture, rectangles)
    (view,) = grid.views
    mask = np.zeros((view.rows, view.cols), dtype=bool)
    index = []
    for top, left, bottom, right in rectangles:
        mask[top:bottom, left:right] = True
        index.append(np.arange(grid.num_tokens).reshape(mask.shape)[top:bottom, left:right].ravel())
    watch.count("vision", len(cells))
    places = torch.from_numpy(np.concatenate(index)).to(cells.device)
    whole = [t.new_zeros(grid.num_tokens, t.shape[1]).index_copy(0, places, t) for t in (cells, *streams)]
    visual = VisualTokens(whole[0], grid, resized=resized, streams=tuple(whole[1:]))
    placed = replace(query, scan=replace(query.scan, visuals=(visual, *others)))
    kept = Kept(grid, mask.ravel())
    return Reasoning(branches.sparse(placed, branches.reason_prompt(placed), kept, Fusion("none")), kept)
