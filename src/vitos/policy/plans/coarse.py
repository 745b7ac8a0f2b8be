"""Plans that look at the image a second time: coarse and crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from vitos.backbones.base import Backbone
from vitos.core.geometry import Box, TokenGrid, enclosing, into_crop, touched_pixels
from vitos.core.names import PlanName
from vitos.core.prompt import VisualTokens
from vitos.core.response import Response
from vitos.core.sparsify import Fusion, Selection, cell_rectangles, select
from vitos.core.stopwatch import Stopwatch
from vitos.policy.plans.base import NO_BOX, Limits, Look, Outcome, Plan, Steps, localized, reasoned
from vitos.policy.plans.two_pass import TwoPass
from vitos.policy.types import Query, Scan

if TYPE_CHECKING:
    from vitos.policy.vlm import SparseVLM


class Crop(Plan):
    """The crop is the rectangle of whole cells around all boxes."""

    name: ClassVar[PlanName] = "crop"

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        _need_pictures(queries, self.name)
        located = yield from localized(vlm, queries, limits)
        second, masks, reasons = [], [], []
        with watch.stage("vision"):
            for query, rollout in zip(queries, located, strict=True):
                selection, scan = vlm.select(query, rollout.response), query.scan
                if not selection.fallback:
                    grid, picture = scan.visuals[0].grid, scan.pictures[0]
                    box = _around(grid, selection)
                    part = picture.crop(touched_pixels(into_crop(box, grid.shown), *picture.size))
                    (looked,) = vlm.encode_many([[part]])[0].visuals
                    watch.count("vision", looked.grid.num_tokens)
                    selection = Selection(grid.overlapping([box]))
                    scan = Scan((looked, *scan.visuals[1:]))
                second.append(replace(query, scan=scan))
                masks.append(selection.mask)
                reasons.append(NO_BOX * selection.fallback)
        prompts = vlm.reason_prompts(second, [None] * len(second))
        answered = yield from reasoned(vlm, second, prompts, limits)
        grids = [query.scan.visuals[0].grid for query in queries]
        return [Outcome(*parts) for parts in zip(located, answered, grids, masks, reasons, strict=True)]


class Coarse(Plan):
    """The evidence's cells are encoded in rectangles, each without the rest of the image, and keep their positions.

    Where the reduced image showed no box, or one smaller than its cells, the image is looked at again: two_pass.
    """

    name: ClassVar[PlanName] = "coarse"
    reduced: ClassVar[bool] = True

    def refusal(self, backbone: Backbone) -> str:
        if backbone.capabilities.any_resolution:
            return ""
        return (
            f"{type(backbone).__name__} sees every image at one resolution, so plan coarse would save nothing; use "
            "gather, two_pass, dense or crop"
        )

    def visuals(self, vlm: SparseVLM, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        with torch.no_grad():
            return (vlm.backbone.encode_reduced(pictures[0]), *vlm.encode_many([pictures[1:]])[0].visuals)

    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        _need_pictures(queries, self.name)
        located = yield from localized(vlm, queries, limits)
        problems = [self._problem(q, r.response.boxes) for q, r in zip(queries, located, strict=True)]
        seen = [i for i, problem in enumerate(problems) if not problem]
        outcomes: dict[int, Outcome] = {}
        with watch.stage("vision"):
            looks = [self._look(vlm, queries[i], located[i].response.boxes, watch) for i in seen]
        answered = yield from reasoned(vlm, [queries[i] for i in seen], [look.prompt for look in looks], limits)
        for i, look, reason in zip(seen, looks, answered, strict=True):
            outcomes[i] = Outcome(located[i], reason, look.grid, look.selection.mask)

        missed = [i for i, problem in enumerate(problems) if problem]
        with watch.stage("vision"):
            again = [replace(queries[i], scan=_whole(vlm, queries[i].scan)) for i in missed]
            watch.count("vision", sum(v.grid.num_tokens for query in again for v in query.scan.visuals))
        for i, outcome in zip(missed, (yield from TwoPass().steps(vlm, again, limits, watch)), strict=True):
            note = f"{problems[i]}; the image was localized on again at full resolution"
            outcomes[i] = replace(outcome, fallback="; ".join(filter(None, (note, outcome.fallback))))
        return [outcomes[i] for i in range(len(queries))]

    def looks(
        self, vlm: SparseVLM, queries: Sequence[Query], responses: Sequence[Response], watch: Stopwatch
    ) -> list[Look]:
        _need_pictures(queries, self.name)
        wholes: dict[int, Look] = {}  # a question stands here once for each of its localizations
        out = []
        with watch.stage("vision"):
            for query, response in zip(queries, responses, strict=True):
                if not self._problem(query, response.boxes):
                    out.append(self._look(vlm, query, response.boxes, watch))
                    continue
                if id(query) not in wholes:
                    wholes[id(query)] = self._look_whole(vlm, query, watch)
                out.append(wholes[id(query)])
        return out

    @staticmethod
    def _look_whole(vlm: SparseVLM, query: Query, watch: Stopwatch) -> Look:
        whole = replace(query, scan=_whole(vlm, query.scan))
        grid = whole.scan.visuals[0].grid
        watch.count("vision", grid.num_tokens)
        everything = Selection(np.ones(grid.num_tokens, dtype=bool), fallback=True)
        return Look(vlm.reason_prompts([whole], [None])[0], grid, everything)

    @staticmethod
    def _problem(query: Query, boxes: Sequence[Box]) -> str:
        """Why the reduced image's boxes cannot be trusted; empty if they can."""
        (view,) = query.scan.visuals[0].grid.views
        if not boxes:
            return "no box could be read from the reduced image"
        x, y = view.edges()
        thin = any(b.x2 - b.x1 < x[1] - x[0] or b.y2 - b.y1 < y[1] - y[0] for b in boxes)
        return "a box is smaller than a cell of the reduced image" if thin else ""

    @staticmethod
    def _look(vlm: SparseVLM, query: Query, boxes: Sequence[Box], watch: Stopwatch) -> Look:
        """The evidence's neighbourhood at full resolution, in the full grid."""
        picture, others = query.scan.pictures[0], query.scan.visuals[1:]
        grid, resized = vlm.backbone.layout(picture)
        grid = grid.within(query.scan.visuals[0].grid.shown)
        rectangles = cell_rectangles(grid, select(grid, boxes, vlm.spec.keep).mask)
        with torch.no_grad():
            cells, *streams = vlm.backbone.encode_cells(picture, rectangles)
        (view,) = grid.views
        mask = np.zeros((view.rows, view.cols), dtype=bool)
        index = []
        for top, left, bottom, right in rectangles:
            mask[top:bottom, left:right] = True
            index.append(np.arange(grid.num_tokens).reshape(mask.shape)[top:bottom, left:right].ravel())
        watch.count("vision", len(cells))
        places = torch.from_numpy(np.concatenate(index)).to(cells.device)
        # Cells that nobody looked at are empty, and dropped with their positions kept.
        whole = [t.new_zeros(grid.num_tokens, t.shape[1]).index_copy(0, places, t) for t in (cells, *streams)]
        visual = VisualTokens(whole[0], grid, resized, tuple(whole[1:]))
        dense = vlm.backbone.build_prompt(vlm.spec.reason_text(query.question, query.kind), (visual, *others))
        masks = [torch.from_numpy(mask.ravel()), *(torch.ones(v.grid.num_tokens, dtype=torch.bool) for v in others)]
        prompt = dense.sparse(masks, Fusion("none"), renumber=vlm.spec.positions == "renumber")
        return Look(prompt, grid, Selection(mask.ravel()))


def _need_pictures(queries: Sequence[Query], name: str) -> None:
    if not all(query.scan.pictures for query in queries):
        raise ValueError(f"plan {name} looks at the image again, which the scan does not hold; make it with encode()")


def _whole(vlm: SparseVLM, scan: Scan) -> Scan:
    """The images of a scan at full resolution."""
    found = vlm.encode_many([scan.pictures])[0]
    return found.of_files(scan.images) if scan.images else found


def _around(grid: TokenGrid, selection: Selection) -> Box:
    """The rectangle around the kept cells, as far as it lies in the picture."""
    cells = [rect for view in grid.views for rect in view.cell_boxes()]
    rect, shown = enclosing([cells[i] for i in np.flatnonzero(selection.mask)]), grid.shown
    return Box(max(rect.x1, shown.x1), max(rect.y1, shown.y1), min(rect.x2, shown.x2), min(rect.y2, shown.y2))
