"""What the decoder of `nano-real` learns: scenes with unlimited questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from nano_real.look import NOTHING, RESIZED, Soups, point_text, window_text
from nano_real.projector import GRID, domain_kinds
from nano_real.questions import Question, known_window, make_templates, middle, numbers
from nano_real.scenes import NUCLEUS, TUMOURS, Corners, Scene, clipped
from numpy.typing import NDArray
from torch import Tensor

from vitos.backbones.llava import Llava
from vitos.core.geometry import Box
from vitos.core.prompt import VisualTokens
from vitos.core.response import format_box_list, format_localization, format_reasoning
from vitos.policy.spec import VitosSpec
from vitos.rl.lessons import Exercise, Lesson

LISTED = 6  # boxes that a short answer lists at most
ASKED = 3  # questions of the templates about a scene, each for one branch


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
        self.soups = Soups(backbone, features, scenes, seed)
        self.heads = [scene for scene in scenes if scene.domain == "brain_tumor_mri"]

    def name_batches(self, count: int) -> Iterator[list[Lesson]]:
        """Names only, the shortest form there is: the question is a kind, the answer its boxes."""
        named = [i for i, scene in enumerate(self.scenes) if self.name_exercises(scene)]
        while True:
            chosen = self.rng.choice(named, count, replace=False)
            yield [*self.lessons(chosen, lambda scene: (self.name_exercises(scene), [])), *self.soups_of(4)]

    def look_batches(self, count: int, steps: int) -> Iterator[list[Lesson]]:
        """Soups, ever larger ones, and copying."""
        for soups in self.soups.batches(count, steps):
            yield [*soups, *(self.copying(2) for _ in range(4))]

    def batches(self, count: int) -> Iterator[list[Lesson]]:
        """Names, points and templates, the latter for both branches; a soup, lest looking is forgotten."""
        while True:
            chosen = self.rng.choice(len(self.scenes), count, replace=False)
            yield [*self.lessons(chosen, self.mixture), self.copying(6), *self.soups_of(2)]

    def soups_of(self, count: int) -> list[Lesson]:
        return [self.soups.lesson(int(size)) for size in self.rng.integers(32, 257, count)]

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
                visual = VisualTokens(embeddings, GRID, resized=RESIZED)
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
            out.append(Exercise(point_text(x, y), f" {what}"))
        for _ in range(3):
            if (window := known_window(scene, rng)) is not None:
                places.append(window.place)
                out.append(Exercise(window_text(window.place), f" {window.truth}"))
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

    def copying(self, count: int) -> Lesson:
        """Which option says it? Without an image: the box is told, a little off."""
        exercises: list[Exercise] = []
        while len(exercises) < count:
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
        visual = VisualTokens(torch.zeros(256, 1), GRID, resized=RESIZED)
        return format_box_list([self.backbone.write_box(Box(*box), visual, "normalized") for box in boxes])
