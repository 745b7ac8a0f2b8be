"""What a picture is known by: its file, its pixels, and a thumbnail that copies of it share.

Pictures are compared by content, never by name: one image saved twice, in two formats or in two folders, is one image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitos.data.images import ImageFacts, load_image, load_image_facts
from vitos.data.picture import parse_selector, split_name, without_crop

SIDE = 16
NEAR = 0.985
"""Least correlation of the thumbnails of a picture and its copy.

Measured on six sets of medical images: copies that were encoded again (JPEG quality 30), halved, darkened or made gray
reach 0.986 in all but a few cases, different pictures of one kind 0.97 at most.
"""
LIKELY, AHEAD = 0.9, 4
"""Less will do where the best match stands out: from LIKELY on, if it is AHEAD times nearer than the second best."""

_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A picture by its content.

    Attributes:
        facts: as `load_image_facts` gives them.
        file: the file's bytes.
        place: the file's bytes and the frame or slice in it.
        picture: the pixels of the whole upright picture.
        shown: the pixels of the part that is looked at.
        thumbnail: shape (SIDE * SIDE,), gray, of mean 0 and length 1; all 0 where the picture has one value.
        flat: whether all pixels have one colour.
        brightest: the largest value of any channel, 0..255.
    """

    facts: ImageFacts
    file: str
    place: str
    picture: str
    shown: str
    thumbnail: NDArray[np.float32]
    flat: bool
    brightest: int


def look_at(path: Path) -> Look:
    """Open a picture and take what it is known by.

    Raises:
        ImageError: from `load_image_facts`.
    """
    shown, facts = load_image_facts(path)
    file, text = split_name(path)
    selector = parse_selector(text)
    whole = shown if selector.crop is None else load_image(without_crop(path))
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    pixels = np.asarray(shown)
    return Look(
        facts=facts,
        file=digest,
        place=f"{digest} {selector.frame or 1} {selector.axis} {selector.slice}",
        picture=_digest(whole),
        shown=_digest(shown),
        thumbnail=_thumbnail(whole),
        flat=bool((pixels == pixels[0, 0]).all()),
        brightest=int(pixels.max()),
    )


def near_copies(these: Mapping[str, Look], those: Mapping[str, Look]) -> list[tuple[str, str]]:
    """Pairs of names, the nearest of `those` for each of `these` that is a copy of one by its thumbnail.

    What the pictures have in common (the round edge of a fundus photograph, the outline of a chest) is taken away
    before: it would make all of them alike. Of few pictures less is taken away, because the copies are a part of it.
    """
    names, others = list(these), list(those)
    if not names or not others:
        return []
    left, right = (np.stack([looks[name].thumbnail for name in looks]) for looks in (these, those))
    count = len(left) + len(right)
    common = (left.sum(axis=0) + right.sum(axis=0)) / count * (1 - 2 / count)
    left, right = _unit(left, common), _unit(right, common)
    pairs = []
    for start in range(0, len(names), _ROWS):
        alike = left[start : start + _ROWS] @ right.T
        best = alike.argmax(axis=1)
        top = alike[np.arange(len(best)), best]
        alike[np.arange(len(best)), best] = 1 if len(others) == 1 else -1  # leaves the second best
        stands_out = (top >= LIKELY) & ((1 - top) * AHEAD < 1 - alike.max(axis=1))
        pairs += [(names[start + row], others[best[row]]) for row in np.flatnonzero((top >= NEAR) | stands_out)]
    return pairs


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def _thumbnail(picture: Image.Image) -> NDArray[np.float32]:
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).ravel()
    unit: NDArray[np.float32] = _unit(values[None], np.float32(values.mean()))[0]
    return unit


def _unit(rows: NDArray[np.float32], common: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """Rows without what is `common`, at length 1; a row of which nothing is left stays 0."""
    rest = rows - common * (np.abs(rows).max(axis=1, keepdims=True) > 0)
    length = np.linalg.norm(rest, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rest, length, out=np.zeros_like(rest), where=length > 1e-6)
    return unit
