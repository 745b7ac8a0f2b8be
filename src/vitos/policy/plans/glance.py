"""Find the evidence at a glance, on the image at half its width and height; encode it alone at full resolution.

    reduced image ─► layers 1..k ─► evidence head ─► cells ─► encoder, full resolution ─► layers 1..L ─► answer

No boxes are written, and neither the encoder nor the later layers see the whole image at full resolution. The head is
trained for it by `vitos distill --plan glance`. Of several images, those without evidence are not encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitos.backbones.base import Backbone
from vitos.core.geometry import Box, TokenGrid
from vitos.core.prompt import VisualTokens
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.plans.base import Reasoning
from vitos.policy.plans.coarse import Coarse, at_full_resolution
from vitos.policy.plans.one_pass import OnePass, best_of
from vitos.policy.types import Query, Rollout


class Glance(OnePass):
    """The cheapest plan for families that see images at any resolution; a budget counts cells of the whole image."""

    reduced = True
    needs_pictures = True
    takes_masks = False
    timed_as = "vision"

    def refusal(self, backbone: Backbone) -> str:
        return super().refusal(backbone) or Coarse(self.name).refusal(backbone)

    def question_problem(self, query: Query) -> str:
        if not query.scan.reduced or not query.scan.pictures:
            return f'the scan was made for another plan than {self.name}; use encode(…, plan="{self.name}")'
        if query.tokens is not None:
            return (
                f"plan {self.name} encodes the image twice, so that a mask of its tokens is none; give boxes instead"
            )
        return ""

    def visuals(self, branches: Branches, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        return Coarse(self.name).visuals(branches, pictures)

    def prepare(
        self, branches: Branches, engine: TorchEngine, queries: Sequence[Query], watch: Stopwatch
    ) -> Sequence[Query]:
        """Score the reduced images (span "early_prefill"); what has run is of no more use, as other tokens follow."""
        scored = super().prepare(branches, engine, queries, watch)
        return [replace(query, scan=replace(query.scan, prefix=None)) for query in scored]

    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        return [
            at_full_resolution(branches, query, partial(_choice, branches, query, boxes), watch, only=True)
            for boxes in evidence
        ]

    def reason_after(
        self, branches: Branches, query: Query, rollouts: Sequence[Rollout], watch: Stopwatch
    ) -> list[Reasoning]:
        return [
            at_full_resolution(branches, query, partial(_drawn, self._drawn(query, rollout)), watch, only=True)
            for rollout in rollouts
        ]


def _drawn(few: Kept, grid: TokenGrid) -> Kept:
    """The cells of the whole images whose centres lie in kept cells of the reduced ones."""
    return Kept(grid, enlarged(few.mask.astype(np.float32), few.grid, grid) > 0.5)


def _choice(branches: Branches, query: Query, boxes: Sequence[Box], grid: TokenGrid) -> Kept:
    """The cells of the whole images to keep: of given boxes, else of the highest score."""
    if boxes:
        return branches.keep(query, boxes, grid)
    scores = None if query.scores is None else enlarged(query.scores, query.grid, grid)
    return best_of(branches.spec, grid, scores, query.budget)


def enlarged(scores: NDArray[np.float32], small: TokenGrid, grid: TokenGrid) -> NDArray[np.float32]:
    """Scores in the cells of reduced images, (n,), as scores in those of the whole ones, (N,): bilinear interpolation.

    Args:
        scores: scores of all images.
        small, grid: grids of all reduced and all whole images, each image in one view.
    """
    out = []
    for few, many, part in zip(small.images, grid.images, small.split(scores), strict=True):
        (source,), (target,) = few.views, many.views
        pixels = torch.from_numpy(part).view(1, 1, source.rows, source.cols)
        larger = torch.nn.functional.interpolate(pixels, (target.rows, target.cols), mode="bilinear")
        out.append(larger.numpy().ravel())
    return np.concatenate(out)
