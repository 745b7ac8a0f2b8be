"""Pictures to learn from: train images of all sets, changed in ways that keep boxes and answers true.

The three sets with questions and what is known of their images are those of nano-real (`nano_real/scenes.py`). Two
more come with boxes (`fundus`) or points (`red_cells`) alone, and `vqa_rad` with questions alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from nano_real.scenes import (
    SIDE,
    Pixels,
    Scene,
    Source,
    clipped,
    corners,
    cut,
    flipped,
    make_scene,
    mapped,
    read_sources,
    toned,
    visible,
)
from nano_real.scenes import inside as seen_from
from PIL import Image

FUNDUS, SMEARS = "fundus", "red_cells"
LESIONS = ("hard exudates", "haemorrhage")
DISC = "optic disc"
CELL_SIDE = 40  # pixels of a red cell in its smear, which is not given: 640 x 480 in all
HELD_OUT = 10  # the last of each ten images


def all_sources(data: Path) -> list[Source]:
    """Train images of the five sets with places; a tenth of each is held out for choices."""
    return [*read_sources(data), *_fundus(data / FUNDUS), *_smears(data / SMEARS)]


def _fundus(folder: Path) -> list[Source]:
    names = {"optic_disc": DISC, "hard_exudates": LESIONS[0], "haemorrhage": LESIONS[1]}
    sources = []
    for index, row in enumerate(json.loads((folder / "train.json").read_text(encoding="utf-8"))):
        found = tuple((names[box["class"]], corners(box["box"])) for box in row["boxes"])
        scene = Scene(FUNDUS, found, frozenset((DISC, *LESIONS)))
        sources.append(Source(folder / row["image"], scene, index % HELD_OUT == HELD_OUT - 1))
    return sources


def _smears(folder: Path) -> list[Source]:
    sources = []
    for index, row in enumerate(json.loads((folder / "train.json").read_text(encoding="utf-8"))):
        half = [CELL_SIDE / 2 / side for side in row["size"]]
        found = tuple(
            (cell["class"], clipped((x - half[0], y - half[1], x + half[0], y + half[1])))
            for cell in row["cells"]
            for x, y in [cell["point"]]
            if cell["class"] != "uncategorised"
        )
        sources.append(Source(folder / row["image"], Scene(SMEARS, found), index % HELD_OUT == HELD_OUT - 1))
    return sources


def picture(
    source: Source, pool: Sequence[tuple[str, Image.Image]], rng: np.random.Generator, changed: bool = True
) -> tuple[Pixels, Scene]:
    """One picture of a source, (224, 224, 3), and what is known of it; unless `changed`, the image as it is."""
    image, scene = source.pixels(), source.scene
    if changed and scene.domain not in (FUNDUS, SMEARS):
        return make_scene(source, pool, rng)
    if changed:
        image, scene = flipped(image, scene, rng)
        if rng.random() < 0.7:
            image, scene = (_zoomed if scene.domain == SMEARS else cut)(image, scene, rng)
        if rng.random() < 0.6:
            image = toned(image, rng)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)), scene


def _zoomed(image: Image.Image, scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """A part of a smear; cells that are cut through are no longer known."""
    size = rng.uniform(0.3, 0.9)
    x, y = rng.uniform(0, 1 - size, 2)
    moved = mapped(scene, lambda b: seen_from(b, x, y, size))
    findings = tuple((kind, clipped(box)) for kind, box in moved.findings if visible(box) > 0.9)
    extent = (x * image.width, y * image.height, (x + size) * image.width, (y + size) * image.height)
    return image.transform(image.size, Image.Transform.EXTENT, extent, Image.Resampling.BICUBIC), replace(
        moved, findings=findings
    )
