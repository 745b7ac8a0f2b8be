"""The branch that is trained at each update (docs/method.md, section 10): each schedule is a list of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitos.config.options import DualStreamOptions

LOCALIZATION, REASONING = "localization", "reasoning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive updates with one objective.

    Attributes:
        name: "localization", "reasoning", "alternating", "joint" or "dense".
        start: number of the first update, from 0.
        steps: number of updates.
        dense: whether the reasoning branch sees all visual tokens (RL without pruning).
        share: weight of the localization loss in a reasoning stage (a guard against forgetting).
    """

    name: str
    start: int
    steps: int
    dense: bool = False
    share: float = 0.0

    def branches(self, step: int) -> Mapping[str, float]:
        """Weights of the branches' losses at an update, whose number counts from the start of the run."""
        if self.name == "joint":
            return {LOCALIZATION: 1.0, REASONING: 1.0}
        if self.name == "alternating":
            return {LOCALIZATION if (step - self.start) % 2 == 0 else REASONING: 1.0}
        if self.name == LOCALIZATION:
            return {LOCALIZATION: 1.0}
        if self.share > 0:
            return {LOCALIZATION: self.share, REASONING: 1.0 - self.share}
        return {REASONING: 1.0}


def make_stages(options: DualStreamOptions) -> tuple[Stage, ...]:
    """The stages of a schedule, in order; each starts with a fresh optimiser state and learning-rate schedule."""
    first, second = options.localization_steps, options.reasoning_steps
    match options.schedule:
        case "staged":
            return (
                Stage(name=LOCALIZATION, start=0, steps=first),
                Stage(name=REASONING, start=first, steps=second, share=options.localization_share),
            )
        case "reversed":
            return (Stage(name=REASONING, start=0, steps=second), Stage(name=LOCALIZATION, start=second, steps=first))
        case "localization-only":
            return (Stage(name=LOCALIZATION, start=0, steps=first),)
        case "reasoning-only":
            return (Stage(name=REASONING, start=0, steps=second),)
        case "dense":
            return (Stage(name="dense", start=0, steps=first + second, dense=True),)
        case "alternating" | "joint":
            return (Stage(name=options.schedule, start=0, steps=first + second),)
    raise ValueError(f"unknown schedule {options.schedule!r}")


def stage_at(stages: tuple[Stage, ...], step: int) -> tuple[int, Stage]:
    """The stage of an update, with the number of the stage, from 0."""
    for number, stage in enumerate(stages):
        if stage.start <= step < stage.start + stage.steps:
            return number, stage
    raise ValueError(f"update {step} lies outside the run of {stages[-1].start + stages[-1].steps}")
