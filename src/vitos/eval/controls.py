"""Other tokens in the same number: the controls of `vitos eval`.

Each is a keep mask of the image's visual tokens, given the question's own evidence; None if it is not defined for a
question. A run without controls cannot say that *the choice of tokens* made a difference (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.masks import centre_mask, fit_budget, inverted_mask, random_mask, shifted_mask
from vitos.core.record import Record
from vitos.core.sparsify import KeepRule, Kept, select
from vitos.engines.base import derive_seed

Control = Callable[[Kept, Record, Sequence[Box], np.random.Generator], BoolArray | None]

CONTROLS: dict[str, Control] = {
    "random": lambda kept, record, boxes, rng: random_mask(kept.grid, kept.count, rng),
    "centre": lambda kept, record, boxes, rng: centre_mask(kept.grid, kept.count),
    "inverted": lambda kept, record, boxes, rng: None if kept.all else inverted_mask(kept.grid, kept.mask, rng),
    "shifted": lambda kept, record, boxes, rng: (
        shifted_mask(kept.grid, boxes, rng, count=kept.count) if boxes else None
    ),
}


ORACLE = "oracle"
"""The control whose masks follow the gold boxes and the model's own keep rule."""


def at_budget(budget: float) -> list[str]:
    """Names of own boxes and controls at a budget."""
    return [f"{name}@{budget:g}" for name in ("own", "random", "centre", "inverted", "oracle")]


def control_masks(
    kept: Kept,
    record: Record,
    boxes: Sequence[Box],
    budgets: Sequence[float],
    *,
    controls: bool,
    seed: int,
    keep: KeepRule = KeepRule(),
) -> dict[str, BoolArray | None]:
    """All masks of one question, by name (`random`, `own@0.25`); one generator draws them in this order.

    Args:
        kept: visual tokens that the policy's own boxes kept.
        boxes: boxes of the policy.
        budgets: shares of the visual tokens at which own boxes and controls compete.
        controls: whether the controls with the policy's own number of tokens are included.
        seed: seed of the random controls.
        keep: the model's keep rule, by which gold boxes keep tokens as its own boxes do.
    """
    rng = np.random.default_rng(derive_seed(seed, "controls", record.id))
    masks = {name: control(kept, record, boxes, rng) for name, control in CONTROLS.items()} if controls else {}
    gold = visible(kept.grid, record.boxes or ())
    if controls:
        masks[ORACLE] = select(kept.grid, gold, keep).mask if gold else None
    for budget in budgets:
        masks |= dict(zip(at_budget(budget), _budget_masks(kept.grid, gold, boxes, budget, rng), strict=True))
    return masks


def _budget_masks(
    grid: TokenGrid, gold: Sequence[Box], boxes: Sequence[Box], budget: float, rng: np.random.Generator
) -> list[BoolArray | None]:
    count = max(1, round(budget * grid.num_tokens))
    own = fit_budget(grid, boxes, count) if boxes else None
    chance = random_mask(grid, count, rng)
    outside = inverted_mask(grid, own, rng) if own is not None and not own.all() else None
    return [
        own,
        chance,
        centre_mask(grid, count),
        outside if outside is not None and outside.sum() == count else None,  # fewer would be another budget
        fit_budget(grid, gold, count) if gold else None,
    ]


def visible(grid: TokenGrid, boxes: Sequence[Box]) -> list[Box]:
    """The boxes that some token looks at: a model may cut off the border of an image."""
    return [box for box in boxes if grid.overlapping([box]).any()]
