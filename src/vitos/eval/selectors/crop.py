"""The rival without token selection: cut the evidence out of the picture and encode it again."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, enclosing
from vitos.data.images import MAX_ASPECT_RATIO
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, selector
from vitos.policy.plans.crop import cut_out


@selector(title="Crop and re-encode", needs=("boxes", "any_resolution"), rank=130)
def crop(task: Task, count: int) -> Choice:
    """The rectangle around the policy's boxes, scaled to at most `count` tokens and encoded again.

    Without a box it is the whole image at a lower resolution. The image processor may make more tokens than `count`,
    because it has a smallest size; the question is then left out of the condition.
    """
    piece = cut_out(task.image(), enclosing(task.boxes or [WHOLE_IMAGE]), task.grid.shown)
    geometry = task.policy.backbone.geometry
    return encoded(task, scaled(piece, count, geometry.patch_size * geometry.merge_size), fallback=not task.boxes)


def encoded(task: Task, picture: Image.Image, *, fallback: bool = False) -> Choice:
    """All tokens of a picture that replaces the image."""
    with torch.no_grad():
        (visual,) = task.policy.backbone.encode([picture])
    everything = np.ones(visual.grid.num_tokens, dtype=bool)
    return Choice(everything, visual=visual, fusion=NO_FUSION, fallback=fallback)


def scaled(piece: Image.Image, count: int, side: int) -> Image.Image:
    """The picture in at most `count` squares of `side` pixels: as near to its shape as that allows."""
    shape = piece.height / piece.width
    possible = [
        (count // rows, rows)
        for rows in range(1, count + 1)
        if max(count // rows, rows) <= MAX_ASPECT_RATIO * min(count // rows, rows)  # what encoders accept
    ]
    cols, rows = min(possible, key=lambda size: (abs(math.log(size[1] / size[0] / shape)), -size[0] * size[1]))
    return piece.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
