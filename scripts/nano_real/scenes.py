"""Scenes to learn from: train images of `../shared/data`, changed in ways that keep boxes and answers true.

An image is flipped, cut or zoomed, its grey values are stretched, and findings of other train images are pasted into
it. What is known of the image moves along: findings (a kind and a box), of which kinds *all* are known (so that they
can be counted), and facts that no list of boxes gives (a window without a platelet, a point on a nucleus).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

SIDE = 224  # pixels of a scene; DINOv2 makes 16 x 16 tokens of them
SETS = ("brain_tumor_mri", "blood_cells", "nuclei")
CELLS = ("red blood cell", "white blood cell", "platelet")
TUMOURS = ("meningioma", "glioma", "pituitary tumour")
NUCLEUS = "nucleus"
KINDS = (*TUMOURS, *CELLS, NUCLEUS)
LEAST_VISIBLE = 0.35  # share of a finding that a cut must leave for it to be one still
SLIVER = 0.03  # what a cut leaves below this share is not seen

Corners = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]


def corners(values: Sequence[float]) -> Corners:
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2)


@dataclass(frozen=True)
class Fact:
    """Something true of an image that its findings do not tell.

    Attributes:
        template: the question it answers.
        place: the window or region in question; a point is a box of no size.
        evidence: boxes to look at.
        truth: the right option; a quadrant is worked out anew after each move and stands here empty.
    """

    template: str
    place: Corners
    evidence: Corners
    truth: str = ""


@dataclass(frozen=True)
class Scene:
    """What is known of an image; coordinates in 0..1 of it.

    Attributes:
        domain: name of the set.
        findings: (kind, box).
        complete: kinds of which all findings are known.
    """

    domain: str
    findings: tuple[tuple[str, Corners], ...]
    complete: frozenset[str] = frozenset()
    facts: tuple[Fact, ...] = ()

    def of(self, *kinds: str) -> list[Corners]:
        """Boxes of these kinds, in reading order."""
        return sorted((box for kind, box in self.findings if kind in kinds), key=lambda b: (b[1] + b[3], b[0] + b[2]))


@dataclass
class Source:
    """An image of a set with all that its questions say of it."""

    path: Path
    scene: Scene
    held_out: bool = field(default=False)

    def pixels(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


# --- what the questions say of the images ---------------------------------------------------------------------------


def read_sources(data: Path) -> list[Source]:
    """All train images of the three sets; a tenth of each is held out for choices."""
    sources = []
    for name in SETS:
        folder = data / name
        records = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        metas = [m for m in json.loads((folder / "meta.json").read_text(encoding="utf-8")) if m["split"] == "train"]
        by_image: dict[str, list[tuple[dict[str, Any], list[Corners]]]] = defaultdict(list)
        for record, meta in zip(records, metas, strict=True):
            by_image[record["image_path"][0]].append((meta, [corners(b) for b in record["bbox"]]))
        own = [Source(folder / path, known(name, said)) for path, said in sorted(by_image.items())]
        for source in held_out(own):
            source.held_out = True
        sources += own
    return sources


def held_out(sources: Sequence[Source]) -> Iterable[Source]:
    """A tenth: of tumours the last of each kind, since neighbours in number look like slices of one head."""
    kinds: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        scene = source.scene
        kinds[scene.findings[0][0] if scene.domain == "brain_tumor_mri" else ""].append(source)
    for kind, own in kinds.items():
        yield from own[-(len(own) // 10) :] if kind else own[5::10]


def known(domain: str, said: Sequence[tuple[dict[str, Any], list[Corners]]]) -> Scene:
    """Findings and facts from the questions of one image."""
    findings: dict[Corners, str] = {}
    complete, facts = set(), []
    for meta, boxes in said:
        template, truth, numbers = meta["template"], meta["truth"], meta["numbers"]
        if template == "tumour_type" or template == "cell_type_at_point":
            findings |= dict.fromkeys(boxes, truth)
        elif template == "wbc_quadrant":
            findings |= dict.fromkeys(boxes, CELLS[1])
            complete.add(CELLS[1])
        elif template == "platelet_count":
            findings |= dict.fromkeys(boxes, CELLS[2])
            complete.add(CELLS[2])
        elif template == "platelet_in_window":
            facts.append(Fact(template, corners(numbers), boxes[0], truth))
        elif template == "nuclei_count":
            findings |= dict.fromkeys(boxes, NUCLEUS)
            complete.add(NUCLEUS)
        elif template == "point_on_nucleus":
            facts.append(Fact(template, (*numbers, *numbers), boxes[0], truth))
        elif template == "largest_nucleus_quadrant":
            findings |= dict.fromkeys(boxes, NUCLEUS)
            facts.append(Fact(template, boxes[0], boxes[0]))
        elif template == "densest_quadrant":
            x, y = ("right" in truth) / 2, ("lower" in truth) / 2
            facts.append(Fact(template, (x, y, x + 0.5, y + 0.5), boxes[0]))
    if domain == "brain_tumor_mri":
        complete |= set(TUMOURS)  # one tumour a slice, with its box
    return Scene(domain, tuple((kind, box) for box, kind in findings.items()), frozenset(complete), tuple(facts))


# --- moves ----------------------------------------------------------------------------------------------------------


def mapped(scene: Scene, place: Callable[[Corners], Corners]) -> Scene:
    """The scene with every box put where `place` says."""
    facts = (replace(f, place=place(f.place), evidence=place(f.evidence)) for f in scene.facts)
    return replace(scene, findings=tuple((kind, place(box)) for kind, box in scene.findings), facts=tuple(facts))


def flipped(image: Image.Image, scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """Mirrored left to right and, where up is no direction, upside down and over the diagonal of a square."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scene = mapped(scene, lambda b: (1 - b[2], b[1], 1 - b[0], b[3]))
    if scene.domain != "brain_tumor_mri":
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            scene = mapped(scene, lambda b: (b[0], 1 - b[3], b[2], 1 - b[1]))
        if image.width == image.height and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.TRANSPOSE)
            scene = mapped(scene, lambda b: (b[1], b[0], b[3], b[2]))
    return image, scene


def visible(box: Corners) -> float:
    """Share of a box that lies in 0..1."""
    inside = max(0.0, min(box[2], 1) - max(box[0], 0)) * max(0.0, min(box[3], 1) - max(box[1], 0))
    return inside / max((box[2] - box[0]) * (box[3] - box[1]), 1e-9)


def touches(one: Corners, other: Corners) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def clipped(box: Corners) -> Corners:
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in box)
    return (x1, y1, x2, y2)


def inside(box: Corners, x: float, y: float, size: float) -> Corners:
    """A box seen from a part of the image that begins at (x, y)."""
    return ((box[0] - x) / size, (box[1] - y) / size, (box[2] - x) / size, (box[3] - y) / size)


def cut(image: Image.Image, scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """A part of the image, of a head also more than the image (black around it). Cuts through findings are redone."""
    head = scene.domain == "brain_tumor_mri"
    for _ in range(20):
        size = rng.uniform(0.75, 1.3) if head else rng.uniform(0.55, 0.95)
        low, high = sorted((0.0, 1 - size))
        x, y = rng.uniform(low, high, 2)
        moved = mapped(scene, lambda b, x=x, y=y, size=size: inside(b, x, y, size))
        seen = [visible(box) for _, box in moved.findings]
        if any(SLIVER < share < (0.9 if head else LEAST_VISIBLE) for share in seen) or (head and max(seen) == 0):
            continue
        findings = tuple(
            (kind, clipped(box))
            for (kind, box), share in zip(moved.findings, seen, strict=True)
            if share >= LEAST_VISIBLE
        )
        facts = tuple(
            replace(f, place=clipped(f.place), evidence=clipped(f.evidence))
            for f in still_true(moved.facts)
            if min(f.place) >= 0 and max(f.place) <= 1
        )
        extent = (x * image.width, y * image.height, (x + size) * image.width, (y + size) * image.height)
        part = image.transform(image.size, Image.Transform.EXTENT, extent, Image.Resampling.BICUBIC)
        return part, replace(moved, findings=findings, facts=facts)
    return image, scene


def pasted(
    image: Image.Image, scene: Scene, pool: Sequence[tuple[str, Image.Image]], rng: np.random.Generator
) -> tuple[Image.Image, Scene]:
    """One to three findings of other images, where none is known to be."""
    image, found = image.copy(), list(scene.findings)
    taken = [box for _, box in found] + [f.evidence for f in scene.facts]
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    for _ in range(int(rng.integers(1, 4)) if scene.domain != "brain_tumor_mri" else 1):
        kind, patch = pool[rng.integers(len(pool))]
        scale = rng.uniform(0.8, 1.25)
        width, height = max(4, round(patch.width * scale)), max(4, round(patch.height * scale))
        if width > 0.6 * image.width or height > 0.6 * image.height:
            continue
        for _ in range(20):
            left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
            box = (
                left / image.width,
                top / image.height,
                (left + width) / image.width,
                (top + height) / image.height,
            )
            if any(touches(box, other) for other in taken):
                continue
            under = grey[top : top + height, left : left + width]
            if scene.domain == "brain_tumor_mri" and np.median(under) < 25:
                continue  # outside of the head
            if scene.domain == "blood_cells" and np.median(under) < np.median(grey) - 12:
                continue  # on another cell
            image.paste(patch.resize((width, height)), (left, top), soft_ellipse(width, height))
            found.append((kind, box))
            taken.append(box)
            break
    return image, replace(scene, findings=tuple(found), facts=still_true(scene.facts))


def still_true(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """Those that outlive a cut or a finding pasted elsewhere: superlatives are of the whole image."""
    return tuple(fact for fact in facts if not fact.template.endswith("quadrant"))


def soft_ellipse(width: int, height: int) -> Image.Image:
    """Opaque in the middle, nothing at the edge: what blends a patch into its surroundings."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = np.clip((1.05 - np.hypot(x, y)) / 0.15, 0, 1)
    mask = Image.fromarray((255 * inside).astype(np.uint8))
    return mask.filter(ImageFilter.GaussianBlur(1))


def toned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another brightness, contrast and saturation."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.8, 1.25))
    return image


# --- all of it ------------------------------------------------------------------------------------------------------


def patches(sources: Sequence[Source]) -> dict[str, list[tuple[str, Image.Image]]]:
    """Findings of all train images, cut out, by set."""
    pool: dict[str, list[tuple[str, Image.Image]]] = defaultdict(list)
    for source in sources:
        image = source.pixels()
        for kind, (x1, y1, x2, y2) in source.scene.findings:
            box = (
                round(x1 * image.width),
                round(y1 * image.height),
                round(x2 * image.width),
                round(y2 * image.height),
            )
            whole = x1 > 0 and y1 > 0 and x2 < 1 and y2 < 1
            if kind != CELLS[0] and whole and min(box[2] - box[0], box[3] - box[1]) >= 6:
                pool[source.scene.domain].append((kind, image.crop(box)))
    return pool


def make_scene(
    source: Source, pool: Sequence[tuple[str, Image.Image]], rng: np.random.Generator
) -> tuple[Pixels, Scene]:
    """One scene of a source: (224, 224, 3) and what is known of it."""
    image, scene = source.pixels(), source.scene
    image, scene = flipped(image, scene, rng)
    # Nuclei of another stain would be known at a glance, so they are not mixed.
    if scene.domain != "nuclei" and scene.complete and rng.random() < 0.3:
        image, scene = pasted(image, scene, pool, rng)
    if rng.random() < 0.55:
        image, scene = cut(image, scene, rng)
    if rng.random() < 0.6:
        image = toned(image, rng)
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image), scene
