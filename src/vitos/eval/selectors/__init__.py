"""Token selectors: ours, the rivals and the controls, all at any budget.

selector = SELECTORS["divprune"]
selector.refusal(backbone)            # a sentence where the model lacks what it needs, else None
choice = selector.choose(task, count)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vitos.backbones.base import Backbone
from vitos.eval.selectors import attention, crop, diversity, merging, places
from vitos.eval.selectors.base import Choice, Task

Need = Literal["boxes", "encoder_attention", "any_resolution"]


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to choose tokens.

    Attributes:
        title: for tables.
        choose: see `vitos.eval.selectors.base`; None where it is not defined for a question.
        needs: "boxes" of a localization pass, "encoder_attention" of the family, or an encoder of "any_resolution".
    """

    name: str
    title: str
    choose: Callable[[Task, int], Choice | None]
    needs: tuple[Need, ...] = ()

    def refusal(self, backbone: Backbone) -> str | None:
        """What the selector needs and the backbone lacks, as a sentence."""
        family = type(backbone)
        if "encoder_attention" in self.needs and family.encoder_attention is Backbone.encoder_attention:
            return f"selector {self.name!r} needs encoder attention, which {family.__name__} does not give"
        if "any_resolution" in self.needs and not backbone.capabilities.any_resolution:
            return (
                f"selector {self.name!r} encodes images of a few tokens, but {family.__name__} makes the same number "
                "of tokens, or whole tiles, of every image"
            )
        return None


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector("policy", "Own boxes (ours)", places.policy, ("boxes",)),
        Selector("oracle", "Oracle (gold) boxes", places.oracle),
        Selector("inverted", "Inverted boxes", places.inverted, ("boxes",)),
        Selector("random", "Random", places.random),
        Selector("centre", "Centre", places.centre),
        Selector("uniform", "Uniform grid", places.uniform),
        Selector("fastv", "FastV", attention.fastv),
        Selector("visionzip", "VisionZip", attention.visionzip, ("encoder_attention",)),
        Selector("divprune", "DivPrune", diversity.divprune),
        Selector("cdpruner", "CDPruner", diversity.cdpruner),
        Selector("question", "Question similarity", diversity.question),
        Selector("tome", "ToMe", merging.tome),
        Selector("crop", "Crop and re-encode", crop.crop, ("boxes", "any_resolution")),
    )
}

__all__ = ["SELECTORS", "Choice", "Selector", "Task"]
