"""Localize on all visual tokens; cut the evidence out of the picture and encode the crop as a separate image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from vitos.core.geometry import BoolArray, Box, Rect, TokenGrid, enclosing, into_crop, touched_pixels
from vitos.core.sparsify import Fusion, Kept
from vitos.core.stopwatch import Stopwatch
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Plan, Reasoning
from vitos.policy.types import Query


class Crop(Plan):
    """The crop is the rectangle of whole cells around all boxes of an image; images without a box are left out."""

    needs_pictures = True
    timed_as = "vision"

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        return [self._cut(branches, query, boxes, watch) for boxes in evidence]

    @staticmethod
    def _cut(branches: Branches, query: Query, boxes: Sequence[Box], watch: Stopwatch) -> Reasoning:
        kept = branches.keep(query, boxes)
        if kept.why_not:
            return Reasoning(branches.reason_prompt(query), kept)
        visuals, masks, covered = list(query.scan.visuals), [], []
        for place, one in enumerate(kept.images):
            boxes = [around(one.grid, one.mask)] if one.count else []
            if boxes:
                (encoded,) = branches.encode([cut_out(query.scan.pictures[place], boxes[0], one.grid.shown)])
                watch.count("vision", encoded.grid.num_tokens)
                visuals[place] = encoded
            masks.append(torch.full((visuals[place].grid.num_tokens,), bool(boxes)))
            covered.append(one.grid.overlapping(boxes))
        prompt = branches.reason_prompt(replace(query, scan=replace(query.scan, visuals=tuple(visuals), prefix=None)))
        if not all(bool(mask.all()) for mask in masks):
            prompt = prompt.sparse(masks, Fusion("none"))
        return Reasoning(prompt, Kept(kept.grid, np.concatenate(covered)))


def cut_out(picture: Image.Image, rect: Rect, shown: Rect) -> Image.Image:
    """The pixels that a rectangle touches, of a picture of the part `shown` of the image; fractions of the image.

    Raises:
        ValueError: if nothing of the rectangle is in the picture.
    """
    return picture.crop(touched_pixels(into_crop(Box(*rect.as_tuple()), shown), *picture.size))


def around(grid: TokenGrid, mask: BoolArray) -> Box:
    """The part of the rectangle around kept cells that lies in the picture."""
    cells = [rect for view in grid.views for rect in view.cell_boxes()]
    rect, shown = enclosing([cells[i] for i in np.flatnonzero(mask)]), grid.shown
    return Box(max(rect.x1, shown.x1), max(rect.y1, shown.y1), min(rect.x2, shown.x2), min(rect.y2, shown.y2))
