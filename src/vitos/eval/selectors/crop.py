"""The rival without token selection: cut the evidence out of the picture and encode it anew."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box, enclosing, touched_pixels
from vitos.eval.selectors.base import NO_FUSION, Choice, Task


def crop(task: Task, count: int) -> Choice:
    """The rectangle around the policy's boxes, scaled to at most `count` tokens and encoded again.

    Without a box it is the whole image at a lower resolution.

    Raises:
        ValueError: if the image processor makes more tokens of it than the budget has.
    """
    box = Box(*enclosing(task.boxes or [WHOLE_IMAGE]).as_tuple())
    geometry = task.policy.backbone.geometry
    piece = cut(task.image(), box, count, geometry.patch_size * geometry.merge_size)
    with torch.no_grad():
        (visual,) = task.policy.backbone.encode([piece])
    made = visual.grid.num_tokens
    if made > count:
        raise ValueError(
            f"{task.record.id}: crop: the image processor makes {made} tokens of {piece.width} x {piece.height} "
            f"pixels, more than the budget of {count}; lower its min_pixels, or leave out this selector or budget"
        )
    return Choice(np.ones(made, dtype=bool), visual, NO_FUSION, fallback=not task.boxes)


def cut(image: Image.Image, box: Box, count: int, side: int) -> Image.Image:
    """The box's pixels, resized to cols x rows squares of `side` pixels: as near to its shape as count allows."""
    x1, y1, x2, y2 = touched_pixels(box, *image.size)
    shape = (y2 - y1) / (x2 - x1)
    rows = min(range(1, count + 1), key=lambda r: (abs(math.log(r / (count // r) / shape)), -r * (count // r)))
    size = (count // rows * side, rows * side)
    return image.crop((x1, y1, x2, y2)).resize(size, Image.Resampling.BICUBIC)
