"""The whole image at fewer pixels: the baseline that needs no selection."""

from __future__ import annotations

from vitos.eval.selectors.base import Choice, Task, selector
from vitos.eval.selectors.crop import encoded, scaled


@selector(title="Resize", needs=("any_resolution",), rank=65)
def resize(task: Task, count: int) -> Choice:
    """The whole image, scaled to at most `count` tokens and encoded again.

    The image processor may make more tokens than `count`, because it has a smallest size; the question is then left
    out of the condition.
    """
    geometry = task.policy.backbone.geometry
    return encoded(task, scaled(task.image(), count, geometry.patch_size * geometry.merge_size))
