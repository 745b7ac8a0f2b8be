"""Selectors by place: chance, the middle, an even grid, and boxes.

They differ only in the choice of tokens, so the dropped tokens are fused as the policy was trained (`Choice.fusion`
is None). Cells that see only padding are taken last, as in `core/masks.py`.
"""

from __future__ import annotations

import numpy as np

from vitos.core.geometry import BoolArray, TokenGrid
from vitos.core.masks import centre_mask, fit_budget, inverted_mask, padding, random_mask
from vitos.eval.controls import visible
from vitos.eval.selectors.base import Choice, Task, mask_of, selector
from vitos.eval.selectors.spread import max_min_order


@selector(title="Random", rank=40, own_budget=2)
def random(task: Task, count: int) -> Choice:
    """`count` tokens drawn at random."""
    return Choice(random_mask(task.grid, count, task.rng("random")))


@selector(title="Centre", rank=50)
def centre(task: Task, count: int) -> Choice:
    """The tokens nearest to the centre of the image."""
    return Choice(centre_mask(task.grid, count))


@selector(title="Uniform grid", rank=60)
def uniform(task: Task, count: int) -> Choice:
    """An even cover of the image (`uniform_mask`)."""
    return Choice(uniform_mask(task.grid, count))


@selector(title="Oracle (gold) boxes", rank=20)
def oracle(task: Task, count: int) -> Choice | None:
    """The tokens of the gold boxes, cut or widened to the budget; None where there are none, or all were cut off."""
    gold = visible(task.grid, task.record.boxes or ())
    return Choice(fit_budget(task.grid, gold, count)) if gold else None


@selector(title="Own boxes (ours)", needs=("boxes",), rank=10, own_budget=1)
def policy(task: Task, count: int) -> Choice:
    """The tokens of the policy's own boxes (ours), cut or widened to the budget; without a box an even cover."""
    if not task.boxes:
        return Choice(uniform_mask(task.grid, count), fallback=True)
    return Choice(fit_budget(task.grid, task.boxes, count))


@selector(title="Inverted boxes", needs=("boxes",), rank=30, own_budget=3)
def inverted(task: Task, count: int) -> Choice:
    """Tokens outside the policy's boxes, drawn at random; without a box as `policy`.

    If the budget is larger than what lies outside, evidence fills the rest, the least central first.
    """
    if not task.boxes:
        return Choice(uniform_mask(task.grid, count), fallback=True)
    grid = task.grid
    evidence = min(int(grid.overlapping(task.boxes).sum()), grid.num_tokens - count)
    if evidence == 0:
        return Choice(random_mask(grid, count, task.rng("inverted")))
    mask = fit_budget(grid, task.boxes, evidence)
    return Choice(inverted_mask(grid, mask, task.rng("inverted"), count=count))


def uniform_mask(grid: TokenGrid, count: int) -> BoolArray:
    """`count` tokens that cover the image evenly: the most central one, then always the farthest from those before it.

    On a square grid, a quarter of the tokens is about every second token of every second row. A smaller budget is
    always part of a larger one (ours).
    """
    if not 1 <= count <= grid.num_tokens:
        raise ValueError(f"count must be in 1..{grid.num_tokens}, the number of visual tokens, got {count}")
    centres = grid.centres()
    distance = ((centres[:, None] - centres[None]) ** 2).sum(-1).round(9)
    image = np.repeat(np.arange(len(grid.images)), [one.num_tokens for one in grid.images])
    distance += 4.0 * (image[:, None] != image)  # farther than any two places in one image
    first = int(centre_mask(grid, 1).argmax())
    order = max_min_order(distance, first, last=padding(grid))
    return mask_of(order[:count], grid.num_tokens)
