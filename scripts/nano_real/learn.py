"""What `nano-real` learns: first its projector, then its decoder, from scenes with unlimited questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nano_real.build import KINDS
from nano_real.questions import Question, area, known_window, make_templates, middle, numbers
from nano_real.scenes import CELLS, NUCLEUS, TUMOURS, Corners, Scene, clipped
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vitos.backbones.llava import Llava
from vitos.geometry import Box, TokenGrid
from vitos.prompt import VisualTokens
from vitos.response import format_box_list, format_localization, format_reasoning
from vitos.spec import VitosSpec
from vitos.supervised import Exercise, Lesson

GRID = TokenGrid.single(16, 16)
RESIZED = (224, 224)
OUTPUT_RMS = 0.2  # of the projected tokens: small beside what the layers add
LISTED = 6  # boxes that a short answer lists at most
ASKED = 3  # questions of the templates about a scene, each for one branch
NOTHING = "nothing"


# --- the projector --------------------------------------------------------------------------------------------------


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


def train_projector(
    backbone: Llava, features: NDArray[np.float16], scenes: Sequence[Scene], steps: int, report: Callable[..., None]
) -> None:
    """Teach the projector to say of every token which finding it sees, where it lies and how the box is written.

    Linear heads read it out and are thrown away. A box and the token's own place are read out as the embeddings of
    their numbers, the code in which the language model has to write them.
    """
    targets = [cell_targets(scene) for scene in scenes]
    kinds = torch.from_numpy(np.stack([t.kinds for t in targets]))
    boxes = torch.from_numpy(np.stack([t.boxes for t in targets]))
    ids = [backbone.tokenizer.get_vocab()[f"{i / 100:.2f}"] for i in range(101)]
    codes = F.normalize(backbone.model.lm_head.weight[ids].detach().clone(), dim=-1)
    width = codes.shape[1]
    projector = backbone.model.model.multi_modal_projector
    standardize(projector.linear_1, torch.from_numpy(features[:64].astype(np.float32)).flatten(0, 1))
    head = nn.Linear(width, len(KINDS) + 6 * width)
    places = torch.from_numpy((100 * GRID.centres()).round().astype(np.int64))
    parameters = [*projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        index = np.sort(np.random.default_rng(step).choice(len(scenes), 16, replace=False))
        seen = torch.from_numpy(features[index].astype(np.float32))
        kind, place, box = head(projector(seen)).split([len(KINDS), 2 * width, 4 * width], dim=-1)
        sure, found = ~kinds[index].isnan(), boxes[index][..., 0] >= 0
        own, truth = 3 * box[found].view(-1, width) @ codes.T, boxes[index][found].view(-1)
        loss = (
            2 * F.binary_cross_entropy_with_logits(kind[sure], kinds[index][sure])
            + 0.2 * F.cross_entropy(3 * place.reshape(-1, width) @ codes.T, places.repeat(len(index), 1).view(-1))
            + 0.5 * F.cross_entropy(own, truth)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        right = (kind[found].argmax(-1) == kinds[index][found].nan_to_num().argmax(-1)).float().mean()
        report(step, loss.item(), right.item(), ((own.argmax(-1) - truth).abs() <= 4).float().mean().item())
    with torch.no_grad():
        scale = OUTPUT_RMS / projector(seen).square().mean().sqrt()
        projector.linear_2.weight.mul_(scale)
        projector.linear_2.bias.mul_(scale)


@torch.no_grad()
def standardize(linear: nn.Linear, inputs: Tensor) -> None:
    """A start from which a layer sees its inputs (n, in) at mean 0 and variance 1."""
    mean, std = inputs.mean(0), inputs.std(0)
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    linear.weight.div_(std)
    linear.bias.copy_(-linear.weight @ mean)


# --- exercises ------------------------------------------------------------------------------------------------------


class Teacher:
    """Lessons about scenes, drawn anew each time.

    Args:
        full: share of lessons that show all tokens; the others show the evidence and a random part of the rest.
    """

    def __init__(
        self,
        backbone: Llava,
        features: NDArray[np.float16],
        scenes: Sequence[Scene],
        spec: VitosSpec,
        *,
        full: float,
        seed: int,
    ) -> None:
        self.backbone, self.features, self.scenes, self.spec, self.full = backbone, features, scenes, spec, full
        self.rng = np.random.default_rng(seed)
        tumours = [box for scene in scenes for kind, box in scene.findings if kind in TUMOURS]
        self.templates = make_templates(tumours)
        self.heads = [scene for scene in scenes if scene.domain == "brain_tumor_mri"]

    def name_batches(self, count: int) -> Iterator[list[Lesson]]:
        """Names only, the shortest form there is: the question is a kind, the answer its boxes."""
        named = [i for i, scene in enumerate(self.scenes) if self.name_exercises(scene)]
        while True:
            chosen = self.rng.choice(named, count, replace=False)
            yield self.lessons(chosen, lambda scene: (self.name_exercises(scene), []))

    def batches(self, count: int) -> Iterator[list[Lesson]]:
        """Names, points and templates, the latter for both branches."""
        while True:
            chosen = self.rng.choice(len(self.scenes), count, replace=False)
            yield [*self.lessons(chosen, self.mixture), self.copying()]

    def lessons(
        self, chosen: NDArray[np.int64], exercises: Callable[[Scene], tuple[list[Exercise], list[Corners]]]
    ) -> list[Lesson]:
        seen = torch.from_numpy(self.features[np.sort(chosen)].astype(np.float32))
        tokens = self.backbone.model.model.multi_modal_projector(seen)
        out = []
        for index, embeddings in zip(np.sort(chosen), tokens, strict=True):
            scene = self.scenes[index]
            own, places = exercises(scene)
            if own:
                visual = VisualTokens(embeddings, GRID, RESIZED)
                kept = None if self.rng.random() < self.full else (self.shown(scene, places),)
                out.append(Lesson((visual,), tuple(own), kept))
        return out

    def shown(self, scene: Scene, places: Sequence[Corners]) -> Tensor:
        """All findings and what the questions are about, and a random part of the rest, at times none of it."""
        seen = map(clipped, [box for _, box in scene.findings] + list(places))
        boxes = [Box(*b) for b in seen if b[0] < b[2] and b[1] < b[3]]
        mask = GRID.overlapping(boxes, int(self.rng.integers(2))) if boxes else np.zeros(256, dtype=bool)
        share = self.rng.choice([0.0, 0.2, 0.4])
        mask |= self.rng.random(256) < share
        mask[self.rng.integers(256)] = True
        return torch.from_numpy(mask)

    def name_exercises(self, scene: Scene) -> list[Exercise]:
        kinds = [kind for kind in domain_kinds(scene) if kind in scene.complete and 1 <= len(scene.of(kind)) <= LISTED]
        out = [Exercise(f"<image>{kind}", self.boxes_text(scene.of(kind))) for kind in kinds]
        if scene.domain == "brain_tumor_mri" and len(scene.findings) == 1:
            out.append(Exercise("<image>tumour", self.boxes_text([scene.findings[0][1]])))
        return out

    def mixture(self, scene: Scene) -> tuple[list[Exercise], list[Corners]]:
        """Names, short questions about places, most to be learned per token, and some of the templates."""
        rng = self.rng
        out, places = self.name_exercises(scene), []
        for (x, y), what in self.points(scene):
            places.append((x - 0.01, y - 0.01, x + 0.01, y + 0.01))
            out.append(Exercise(f"<image>What is at ({x:.2f}, {y:.2f})?", f" {what}"))
        for _ in range(3):
            if (window := known_window(scene, rng)) is not None:
                places.append(window.place)
                out.append(Exercise(f"<image>platelet in {numbers(window.place)}?", f" {window.truth}"))
        asked = [q for template in self.templates.values() if (q := template(scene, rng)) is not None]
        for i in rng.permutation(len(asked))[:ASKED]:
            out.append(self.localize_exercise(asked[i]) if rng.random() < 0.5 else self.reason_exercise(asked[i]))
            places += asked[i].evidence
        return out, places

    def points(self, scene: Scene) -> list[tuple[tuple[float, float], str]]:
        """Places and the kind there, or "nothing" where all findings are known."""
        rng, out = self.rng, []
        kinds = sorted({kind for kind, _ in scene.findings})
        for _ in range(3 if kinds else 0):
            kind = kinds[rng.integers(len(kinds))]
            own = scene.of(kind)
            box = own[rng.integers(len(own))]
            size = np.array([box[2] - box[0], box[3] - box[1]])
            x, y = np.clip(np.array(middle(box)) + 0.15 * size * rng.normal(0, 1, 2), 0.01, 0.99)
            out.append(((float(x), float(y)), kind))
        said = {"yes": NUCLEUS, "no": NOTHING}
        out += [(middle(f.place), said[f.truth]) for f in scene.facts if f.template == "point_on_nucleus"]
        if set(domain_kinds(scene)) <= scene.complete:
            for x, y in rng.uniform(0.02, 0.98, (3, 2)):
                if not any(b[0] - 0.04 < x < b[2] + 0.04 and b[1] - 0.04 < y < b[3] + 0.04 for _, b in scene.findings):
                    out.append(((float(x), float(y)), NOTHING))
        return out

    def copying(self) -> Lesson:
        """Which option says it? Without an image: the box is told, a little off."""
        exercises: list[Exercise] = []
        while len(exercises) < 6:
            q = self.templates["tumour_box"](self.heads[self.rng.integers(len(self.heads))], self.rng)
            if q is not None:
                told = np.clip(np.array(q.evidence[0]) + self.rng.normal(0, 0.02, 4), 0, 1)
                text = f"The tumour is at {numbers(told)}. " + q.text.removeprefix("<image>")
                exercises.append(Exercise(self.spec.reason_text(text), format_reasoning("it is there", q.truth)))
        return Lesson((), tuple(exercises))

    def localize_exercise(self, q: Question) -> Exercise:
        """Where to look, the boxes, and the answer read off them: a name is not guessed before looking."""
        target = format_localization(q.about, self.boxes_text(q.evidence), q.truth)
        return Exercise(self.spec.localize_text(q.text), target)

    def reason_exercise(self, q: Question) -> Exercise:
        return Exercise(self.spec.reason_text(q.text), format_reasoning("it is there", q.truth))

    def boxes_text(self, boxes: Sequence[Corners]) -> str:
        visual = VisualTokens(torch.zeros(256, 1), GRID, RESIZED)
        return format_box_list([self.backbone.write_box(Box(*box), visual, "normalized") for box in boxes])
