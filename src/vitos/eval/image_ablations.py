"""Does the model look? Pictures that should take the answer away, or leave it.

Without its picture, with another one or without the evidence, a model that looks answers worse; without the
surroundings its answers should hold. A model that answers as before goes by the words of the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from vitos.core.geometry import Box, touched_pixels
from vitos.core.record import Record
from vitos.engines.base import derive_seed


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size in the mean colour."""
    return Image.new("RGB", image.size, mean_colour(image))


def painted(image: Image.Image, boxes: Sequence[Box], *, inside: bool) -> Image.Image:
    """The picture with the boxes, or everything else, in its mean colour; a box includes all pixels that it touches.

    Args:
        boxes: evidence in fractions of this picture.
        inside: paint over the boxes; otherwise over their surroundings.
    """
    pixels = np.array(image.convert("RGB"))
    hit = np.zeros(pixels.shape[:2], dtype=bool)
    for box in boxes:
        left, top, right, bottom = touched_pixels(box, *image.size)
        hit[top:bottom, left:right] = True
    pixels[hit if inside else ~hit] = mean_colour(image)
    return Image.fromarray(pixels)


def mean_colour(image: Image.Image) -> tuple[int, int, int]:
    """The mean of an RGB picture's pixels."""
    red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


def swaps(records: Sequence[Record], seed: int) -> dict[str, Record]:
    """For each question a record whose images are shown instead (`swapped_paths`), never one about the same image(s).

    The distinct images are put in a random circle, and each takes the place of the next one. Empty if all questions
    are about one image.
    """
    first = {record.image_paths: record for record in reversed(records)}
    circle = sorted(first, key=lambda paths: derive_seed(seed, "shuffled", first[paths].id))
    if len(circle) < 2:
        return {}
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return {record.id: first[following[record.image_paths]] for record in records}


def swapped_paths(record: Record, other: Record) -> tuple[Path, ...]:
    """The images that are shown instead of a record's: those of another record, repeated if it has fewer."""
    return tuple(path for path, _ in zip(cycle(other.image_paths), record.image_paths, strict=False))
