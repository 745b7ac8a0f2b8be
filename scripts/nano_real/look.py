"""Looking things up, before real questions: which kind of finding is at a point, and is there one in a window?

Real questions hardly teach it: an image has few findings, and guessing its commonest kind costs little. A *soup* is
made of tokens of many scenes, each in its own cell: kinds are mixed evenly, so that only looking answers. It begins
with a few tokens and grows to a whole grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from nano_real.projector import GRID, cell_targets
from nano_real.questions import WINDOW, numbers
from nano_real.scenes import CELLS, KINDS, Scene
from numpy.typing import NDArray

from vitos.backbones.llava import Llava
from vitos.core.prompt import VisualTokens
from vitos.rl.lessons import Exercise, Lesson

NOTHING = "nothing"
NAMES = (*KINDS, NOTHING)
RESIZED = (224, 224)
FEWEST, MOST = 8, 256  # tokens of a soup
FINDINGS = 24  # of them that are no background, in a large soup
POINTS, WINDOWS = 8, 4  # questions about a soup
OF_A_SCENE = 6  # tokens of a kind that a scene gives


def point_text(x: float, y: float) -> str:
    return f"<image>What is at (x={x:.2f}, y={y:.2f})?"


def window_text(window: Sequence[float]) -> str:
    return f"<image>{CELLS[2]} in {numbers(window)}?"


class Soups:
    """Lessons of mixed tokens, drawn anew each time."""

    def __init__(
        self,
        backbone: Llava,
        features: NDArray[np.float16],
        scenes: Sequence[Scene],
        seed: int,
        most_scenes: int = 4000,
    ) -> None:
        self._projector = backbone.model.model.multi_modal_projector
        self._rng = np.random.default_rng(seed)
        rows, cells, labels = [], [], []
        for index in np.sort(self._rng.choice(len(scenes), min(most_scenes, len(scenes)), replace=False)):
            known = _labels(scenes[index])
            for label in np.unique(known[known >= 0]):
                own = self._rng.permutation(np.flatnonzero(known == label))[:OF_A_SCENE]
                rows.append(features[index][own])
                cells += own.tolist()
                labels += [label] * len(own)
        self._tokens, cell, kind = np.concatenate(rows), np.array(cells), np.array(labels)
        self._places = [
            {k: own for k in range(len(NAMES)) if len(own := np.flatnonzero((cell == c) & (kind == k)))}
            for c in range(GRID.num_tokens)
        ]

    def batches(self, count: int, steps: int) -> Iterator[list[Lesson]]:
        """`steps` batches, whose soups grow from `FEWEST` tokens to `MOST` in three quarters of them."""
        for step in range(steps):
            size = round(FEWEST * (MOST / FEWEST) ** min(1.0, step / (0.75 * steps)))
            yield [self.lesson(size) for _ in range(count)]

    def lesson(self, size: int) -> Lesson:
        """A soup of `size` tokens and questions about it."""
        rng = self._rng
        cells = np.sort(rng.choice(GRID.num_tokens, size, replace=False))
        findings = set(rng.permutation(size)[: min(FINDINGS, size * 7 // 8)].tolist())
        chosen, kinds = [], []
        for place, c in enumerate(cells):
            there = [k for k in self._places[c] if (NAMES[k] != NOTHING) == (place in findings)] or [*self._places[c]]
            kinds.append(there[rng.integers(len(there))])
            chosen.append(rng.choice(self._places[c][kinds[-1]]))
        seen = self._projector(torch.from_numpy(self._tokens[chosen].astype(np.float32)))
        tokens = seen.new_zeros(GRID.num_tokens, seen.shape[1])
        tokens = tokens.index_copy(0, torch.from_numpy(cells), seen)
        kept = torch.zeros(GRID.num_tokens, dtype=torch.bool)
        kept[cells] = True
        labels = np.array(kinds)
        exercises = [*self._points(cells, labels), *self._windows(cells, labels)]
        return Lesson((VisualTokens(tokens, GRID, resized=RESIZED),), tuple(exercises), (kept,))

    def _points(self, cells: NDArray[np.int64], labels: NDArray[np.int64]) -> Iterator[Exercise]:
        """Kinds are asked alike often; a point lies anywhere in its cell but near an edge."""
        rng, there = self._rng, np.unique(labels)
        for _ in range(POINTS):
            same = np.flatnonzero(labels == there[rng.integers(len(there))])
            place = same[rng.integers(len(same))]
            x, y = GRID.centres()[cells[place]] + rng.uniform(-0.4, 0.4, 2) / 16
            yield Exercise(point_text(x, y), f" {NAMES[labels[place]]}")

    def _windows(self, cells: NDArray[np.int64], labels: NDArray[np.int64]) -> Iterator[Exercise]:
        """Is there a platelet (what the sets ask)? Half of the answers are yes, where that can be."""
        rng, centres, platelet = self._rng, GRID.centres()[cells], labels == KINDS.index(CELLS[2])
        for _ in range(WINDOWS):
            truth = rng.random() < 0.5
            for _ in range(20):
                low = rng.uniform(0, 1 - np.array(WINDOW))
                inside, near = (
                    ((centres > low - slack) & (centres < low + WINDOW + slack)).all(-1) for slack in (-0.02, 0.02)
                )
                if truth == (inside & platelet).any() == (near & platelet).any():
                    yield Exercise(window_text((*low, *(low + WINDOW))), " yes" if truth else " no")
                    break


def _labels(scene: Scene) -> NDArray[np.int64]:
    """The place in `NAMES` of what every token sees, (256,); -1 where that is not known."""
    kinds = cell_targets(scene).kinds
    known = ~np.isnan(kinds).any(axis=1)
    found = np.nan_to_num(kinds).max(axis=1) > 0
    return np.where(found, np.nan_to_num(kinds).argmax(axis=1), np.where(known, len(KINDS), -1))
