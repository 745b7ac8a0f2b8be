"""Batches of lessons about the pictures of `small/data.py`, the same for a step however the run was stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nano_real.look import Soups
from nano_real.projector import GRID
from nano_real.scenes import SETS, Fact, Scene, corners
from numpy.typing import NDArray
from torch import Tensor

from small.projector import cell_of
from vitos.backbones.llava import Llava
from vitos.core.geometry import Box
from vitos.core.prompt import VisualTokens
from vitos.core.record import Record
from vitos.core.response import format_localization, format_reasoning
from vitos.data.readers import read_records
from vitos.nano.small import PIXELS
from vitos.policy.branches import Branches
from vitos.policy.spec import VitosSpec
from vitos.rl.lessons import Exercise, Lesson

MOST_SIDE = 24.0  # an exercise with more boxes than 8 is drawn this many boxes' worth less often
SHORT = 8


@dataclass(frozen=True)
class Pictures:
    """The folder of `write_data`, read.

    Attributes:
        features: (n, 256, 768).
        scenes: what is known of each picture, None where it is no composite.
        records: of each picture.
    """

    features: NDArray[np.float16]
    scenes: list[Scene | None]
    records: list[list[Record]]


def read_pictures(folder: Path) -> Pictures:
    features = np.load(folder / "features.npy", mmap_mode="r")
    told: dict[str, Any] = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    by_image: dict[str, list[Record]] = {}
    for record in read_records(folder / "train.json"):
        by_image.setdefault(str(record.image_paths[0].relative_to(folder.absolute())), []).append(record)
    return Pictures(features, [_scene(row) for row in told["scenes"]], [by_image[path] for path in told["images"]])


def _scene(row: dict[str, Any] | None) -> Scene | None:
    if row is None:
        return None
    facts = (Fact(f["template"], corners(f["place"]), corners(f["evidence"]), f["truth"]) for f in row["facts"])
    findings = tuple((kind, corners(box)) for kind, box in row["findings"])
    return Scene(row["domain"], findings, frozenset(row["complete"]), tuple(facts))


@dataclass(frozen=True)
class Batch:
    """Lessons whose visual tokens are `tokens`, cut off from the projector.

    Attributes:
        index: pictures of the batch.
        tokens: (pictures, 256, hidden), a leaf with gradients.
        lessons: one for each picture, then soups.
        evidence: of each lesson the visual tokens it shows that answer its exercises, bool (n, shown); none of them
            for an exercise of which that is not known.
    """

    index: NDArray[np.int64]
    tokens: Tensor
    lessons: list[Lesson]
    evidence: list[Tensor]


class Teacher:
    """Draws batches.

    Args:
        full: share of lessons that show all tokens; the others show the evidence and a random part of the rest, and
            ask the reasoning branch alone.
        asked: number of exercises about a picture.
    """

    def __init__(
        self, backbone: Llava, pictures: Pictures, spec: VitosSpec, *, full: float = 0.6, asked: int = 9, seed: int = 0
    ) -> None:
        self.backbone, self.pictures, self.spec, self.seed = backbone, pictures, spec, seed
        self.full, self.asked = full, asked
        self.soups = _soups(backbone, pictures, seed)

    def batch(self, step: int, count: int, soups: Sequence[int]) -> Batch:
        """The batch of a step.

        Args:
            count: number of pictures.
            soups: sizes of the soups (`nano_real.look`).
        """
        rng = np.random.default_rng([self.seed, step])
        self.soups._rng = np.random.default_rng([self.seed, step, 1])
        index = np.sort(rng.choice(len(self.pictures.records), min(count, len(self.pictures.records)), replace=False))
        seen = torch.from_numpy(self.pictures.features[index].astype(np.float32))
        with torch.no_grad():
            tokens = self.backbone.model.model.multi_modal_projector(seen).float()
        tokens.requires_grad_(True)
        drawn = [self._lesson(i, own, rng) for i, own in zip(index, tokens, strict=True)]
        drawn += [(soup, _asked(soup)) for soup in map(self.soups.lesson, soups)]
        return Batch(index, tokens, [lesson for lesson, _ in drawn], [evidence for _, evidence in drawn])

    def _lesson(self, index: int, embeddings: Tensor, rng: np.random.Generator) -> tuple[Lesson, Tensor]:
        records, visual = self.pictures.records[index], visual_of(embeddings)
        weights = np.array([min(1.0, SHORT / len(r.boxes or ((),))) for r in records])
        drawn = rng.choice(len(records), min(self.asked, len(records)), replace=False, p=weights / weights.sum())
        chosen = [records[i] for i in drawn]
        dense = rng.random() < self.full
        exercises = [
            exercise(
                self.backbone, self.spec, record, visual, localize=dense and bool(record.boxes) and rng.random() < 0.5
            )
            for record in chosen
        ]
        evidence = torch.stack([_covered(record) for record in chosen])
        if dense:
            return Lesson((visual,), tuple(exercises)), evidence
        kept = _shown(chosen, rng)
        return Lesson((visual,), tuple(exercises), (kept,)), evidence[:, kept]


def visual_of(embeddings: Tensor) -> VisualTokens:
    return VisualTokens(embeddings, GRID, resized=(PIXELS, PIXELS))


def exercise(backbone: Llava, spec: VitosSpec, record: Record, visual: VisualTokens, localize: bool) -> Exercise:
    """What a record asks of a branch. Options are answered by their text or, where asked for, by their letter."""
    by_letter = record.meta.get("form") == "letter"
    answer = record.answer if by_letter else record.options.get(record.answer, record.answer)
    thought = record.meta.get("thought") or answer
    if not localize:
        return Exercise(spec.reason_text(record.question, record.kind), format_reasoning(thought, answer))
    boxes = Branches(backbone, spec).evidence_text(record.question, [visual], record.boxes or ())
    text = spec.localize_text(record.question, record.kind)
    return Exercise(text, format_localization(thought, boxes, answer))


def _asked(soup: Lesson) -> Tensor:
    """The cell of the point that each question of a soup asks about; none for windows."""
    if soup.kept is None:
        raise ValueError("a soup shows the tokens it is made of")
    evidence = torch.zeros(len(soup.exercises), 256, dtype=torch.bool)
    for row, one in zip(evidence, soup.exercises, strict=True):
        if found := re.search(r"x=(\d\.\d\d), y=(\d\.\d\d)", one.text):
            row[cell_of(*map(float, found.groups()))] = True
    return evidence[:, soup.kept[0]]


def _covered(record: Record) -> Tensor:
    """The tokens of the evidence, bool (256,); none where there are no boxes."""
    return torch.from_numpy(GRID.overlapping(_boxes([record])))


def _boxes(records: Sequence[Record]) -> list[Box]:
    return [Box(b.x1, b.y1, b.x2, b.y2) for record in records for b in record.boxes or ()]


def _shown(records: Sequence[Record], rng: np.random.Generator) -> Tensor:
    """The tokens of all evidence and a random part of the rest, at times none of it; bool (256,)."""
    boxes = _boxes(records)
    mask = GRID.overlapping(boxes, int(rng.integers(2))) if boxes else np.zeros(256, dtype=bool)
    mask |= rng.random(256) < rng.choice([0.05, 0.2, 0.4])
    mask[rng.integers(256)] = True
    return torch.from_numpy(mask)


def _soups(backbone: Llava, pictures: Pictures, seed: int) -> Soups:
    """Soups know the kinds of the three sets with questions only."""
    known = [i for i, scene in enumerate(pictures.scenes) if scene is not None and scene.domain in SETS]
    scenes = [scene for i in known if (scene := pictures.scenes[i]) is not None]
    chosen = np.sort(np.random.default_rng(seed).choice(len(known), min(2000, len(known)), replace=False))
    return Soups(
        backbone, pictures.features[[known[i] for i in chosen]], [scenes[i] for i in chosen], seed, most_scenes=2000
    )
