"""Which weights train: all but the vision encoder's, or those that a recipe names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitos.backbones.base import Backbone


def freeze_others(backbone: Backbone, patterns: str | Sequence[str] | None = None, *, encoder: bool = False) -> None:
    """Freeze the vision encoder, and all weights except those whose name contains a match of a regular expression.

    Args:
        backbone: the model; what is frozen already stays so.
        patterns: regular expressions; None: no further weights are frozen.
        encoder: leave the vision encoder as it is, so that it trains.

    Raises:
        ValueError: for a pattern that is not a regular expression, or that matches no weight that is trained so far.
    """
    vision = {weight for module in backbone.vision_modules for weight in module.parameters()}
    if not encoder:
        for weight in vision:
            weight.requires_grad_(False)
    if patterns is None:
        return
    named = backbone.model.named_parameters()
    weights = {name: weight for name, weight in named if weight.requires_grad and weight not in vision}
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = {name for name in weights if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"unfrozen_parameters: {pattern!r} is not a regular expression ({error})") from error
        if not found:
            raise ValueError(
                f"unfrozen_parameters: {pattern!r} is in the name of no weight that is trained; names look like "
                f"{', '.join(list(weights)[:: max(1, len(weights) // 3)])}"
            )
        chosen |= found
    for name, weight in weights.items():
        weight.requires_grad_(name in chosen)
