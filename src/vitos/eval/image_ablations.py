"""Does it look? Pictures that should take the answer away, or leave it.

Without its picture, with another one or without the evidence a model that looks answers worse; without the
surroundings it should hold. A model that answers as before goes by the words (field_notes P24).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vitos.core.geometry import BoolArray, Box
from vitos.core.record import Record
from vitos.engines.base import derive_seed


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size in the mean colour."""
    return Image.new("RGB", image.size, mean_colour(image))


def painted(image: Image.Image, boxes: Sequence[Box], *, inside: bool) -> Image.Image:
    """The picture with the boxes, or all but the boxes, in its mean colour; pixels that a box touches belong to it."""
    pixels = np.array(image.convert("RGB"))
    hit = covered(image.size, boxes)
    pixels[hit if inside else ~hit] = mean_colour(image)
    return Image.fromarray(pixels)


def covered(size: tuple[int, int], boxes: Sequence[Box]) -> BoolArray:
    """Pixels that a box touches, bool, shape (height, width)."""
    width, height = size
    hit = np.zeros((height, width), dtype=bool)
    for box in boxes:
        rows = slice(math.floor(box.y1 * height), math.ceil(box.y2 * height))
        hit[rows, math.floor(box.x1 * width) : math.ceil(box.x2 * width)] = True
    return hit


def mean_colour(image: Image.Image) -> tuple[int, int, int]:
    """Mean of an RGB picture's pixels."""
    red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


def swaps(records: Sequence[Record], seed: int) -> dict[str, Record]:
    """For every question another one whose first image it is shown instead: never one about the same image(s).

    The distinct images are put in a random circle and each takes the next one's place. Empty with one image only.
    """
    first = {record.image_paths: record for record in reversed(records)}
    circle = sorted(first, key=lambda paths: derive_seed(seed, "shuffled", first[paths].id))
    if len(circle) < 2:
        return {}
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return {record.id: first[following[record.image_paths]] for record in records}
