"""The projector of `nano-real`: every visual token says where it is and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nano_real.questions import area, middle, number_tokens
from nano_real.scenes import CELLS, KINDS, NUCLEUS, TUMOURS, Corners, Scene
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vitos.backbones.llava import Llava
from vitos.core.geometry import TokenGrid

GRID = TokenGrid.single(16, 16)
OUTPUT_RMS = 0.2  # of the projected tokens, their place aside: small beside what the layers add
CYCLES = (0.5, 1.0, 2.0, 4.0)  # of the place's waves over the image
PLACE = 4 * len(CYCLES)  # values of a place: cosine and sine of x and of y
PLACE_RMS = 1.06
HELD = PLACE + 3  # of the outputs stay as they are: the place, and marks of text tokens, 0 here


@dataclass(frozen=True)
class CellTargets:
    """Of every token.

    Attributes:
        kinds: (256, 7), 1 or 0, NaN where nobody knows.
        boxes: (256, 4), hundredths, of the finding that covers most of it; -1 for none.
    """

    kinds: NDArray[np.float32]
    boxes: NDArray[np.int64]


def cell_targets(scene: Scene) -> CellTargets:
    kinds = np.full((256, len(KINDS)), np.nan, dtype=np.float32)
    boxes = np.full((256, 4), -1, dtype=np.int64)
    for index, kind in enumerate(KINDS):
        if kind in scene.complete or kind not in domain_kinds(scene):
            kinds[:, index] = 0
    for fact in scene.facts:
        if fact.template == "platelet_in_window" and fact.truth == "no":
            kinds[covered(fact.place) > 0.5, KINDS.index(CELLS[2])] = 0
        if fact.template == "point_on_nucleus":
            x, y = middle(fact.place)
            kinds[min(int(16 * y), 15) * 16 + min(int(16 * x), 15), KINDS.index(NUCLEUS)] = float(fact.truth == "yes")
    most = np.full(256, 0.2)  # share of the cell; a sliver is not a finding
    for kind, box in sorted(scene.findings, key=lambda f: -area(f[1])):  # small ones last: theirs are their best cells
        share = covered(box)
        best = share > np.minimum(most, 0.8 * share.max())
        kinds[best] = np.where(np.arange(len(KINDS)) == KINDS.index(kind), 1, 0)
        boxes[best] = [round(100 * v) for v in box]
        most = np.where(best, share, most)
    return CellTargets(kinds, boxes)


def domain_kinds(scene: Scene) -> tuple[str, ...]:
    return {"brain_tumor_mri": TUMOURS, "blood_cells": CELLS, "nuclei": (NUCLEUS,)}[scene.domain]


def covered(box: Corners) -> NDArray[np.float64]:
    """Share of every cell that a box covers, (256,)."""
    edges = np.arange(17) / 16
    x, y = (
        np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * 16
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    return np.outer(y, x).reshape(-1)


# --- places ---------------------------------------------------------------------------------------------------------


def place_code(points: Tensor) -> Tensor:
    """Points (..., 2) in 0..1 as waves, (..., `PLACE`): near points are alike, far ones are not."""
    return torch.cat([wave(2 * torch.pi * c * points) for c in CYCLES for wave in (torch.cos, torch.sin)], dim=-1)


class PlacePath:
    """Units of a projector that carry a token's place to its first `PLACE` outputs, and stay as they are.

    The encoder's early layer says where a token is, linearly. Least squares reads the waves u of `place_code` from it,
    and two hidden units, u and -u, pass them through the activation, because gelu(u) - gelu(-u) = u. Trained freely, a
    projector loses the place (`scripts/probe_places.py`): it hardly weighs in any loss before it is used.
    """

    def __init__(self, projector: nn.Module, seen: Tensor) -> None:
        """Write the path into the projector, from what the encoder says of some images (n, 256, in)."""
        self._projector = projector
        code = place_code(torch.from_numpy(GRID.centres())).repeat(len(seen), 1)
        inputs = torch.cat([seen.double(), torch.ones(*seen.shape[:2], 1, dtype=torch.float64)], dim=-1)
        read = torch.linalg.lstsq(inputs.flatten(0, 1), code).solution.float().T  # (PLACE, in + 1)
        read = torch.cat([read, -read])
        width = projector.linear_2.out_features
        self._first = read
        self._second = PLACE_RMS * 2**0.5 * torch.eye(width, PLACE)
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what an optimizer did to the path."""
        units, (first, second) = 2 * PLACE, (self._projector.linear_1, self._projector.linear_2)
        first.weight[:units], first.bias[:units] = self._first[:, :-1], self._first[:, -1]
        second.weight[:, :units] = torch.cat([self._second, -self._second], dim=1)
        second.weight[:HELD, units:] = 0
        second.bias[:HELD] = 0


# --- training -------------------------------------------------------------------------------------------------------


def train_projector(
    backbone: Llava, features: NDArray[np.float16], scenes: Sequence[Scene], steps: int, report: Callable[..., None]
) -> None:
    """Teach the projector to say of every token which finding it sees and how the finding's box is written.

    Linear heads read it out and are thrown away; a box as the embeddings of its numbers, the code in which the
    language model has to write them. Where a token is, it says from the start and throughout (`PlacePath`).
    """
    targets = [cell_targets(scene) for scene in scenes]
    kinds = torch.from_numpy(np.stack([t.kinds for t in targets]))
    boxes = torch.from_numpy(np.stack([t.boxes for t in targets]))
    codes = F.normalize(backbone.model.lm_head.weight[number_tokens(backbone.tokenizer)].detach().clone(), dim=-1)
    width = codes.shape[1]
    projector = backbone.model.model.multi_modal_projector
    standardize(projector.linear_1, torch.from_numpy(features[:64].astype(np.float32)).flatten(0, 1))
    path = hold_places(projector, features)
    head = nn.Linear(width, len(KINDS) + 4 * width)
    parameters = [*projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        index = np.sort(np.random.default_rng(step).choice(len(scenes), 16, replace=False))
        seen = torch.from_numpy(features[index].astype(np.float32))
        kind, box = head(projector(seen)).split([len(KINDS), 4 * width], dim=-1)
        sure, found = ~kinds[index].isnan(), boxes[index][..., 0] >= 0
        own, truth = 3 * box[found].view(-1, width) @ codes.T, boxes[index][found].view(-1)
        loss = 2 * F.binary_cross_entropy_with_logits(kind[sure], kinds[index][sure]) + 0.5 * F.cross_entropy(
            own, truth
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        path.restore()
        right = (kind[found].argmax(-1) == kinds[index][found].nan_to_num().argmax(-1)).float().mean()
        report(step, loss.item(), right.item(), ((own.argmax(-1) - truth).abs() <= 4).float().mean().item())
    with torch.no_grad():
        scale = OUTPUT_RMS / projector(seen)[..., HELD:].square().mean().sqrt()
        projector.linear_2.weight[HELD:].mul_(scale)
        projector.linear_2.bias[HELD:].mul_(scale)


def hold_places(projector: nn.Module, features: NDArray[np.float16]) -> PlacePath:
    """The path as it is read from 300 scenes; the same ones each time."""
    index = np.sort(np.random.default_rng(0).choice(len(features), 300, replace=False))
    return PlacePath(projector, torch.from_numpy(features[index].astype(np.float32)))


@torch.no_grad()
def standardize(linear: nn.Linear, inputs: Tensor) -> None:
    """A start from which a layer sees its inputs (n, in) at mean 0 and variance 1."""
    mean, std = inputs.mean(0), inputs.std(0)
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    linear.weight.div_(std)
    linear.bias.copy_(-linear.weight @ mean)
