"""Which branch is trained at which update (algorithm.md §8): every schedule and ablation is a list of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitos.config.options import DualStreamOptions

LOCALIZATION, REASONING = "localization", "reasoning"


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of updates with one objective.

    Attributes:
        name: "localization", "reasoning", "alternating", "joint" or "dense".
        start, steps: its first update and their number.
        dense: RL without pruning: the reasoning branch sees all visual tokens.
        share: weight of the localization loss mixed into a reasoning stage (a guard against forgetting).
    """

    name: str
    start: int
    steps: int
    dense: bool = False
    share: float = 0.0

    def branches(self, step: int) -> Mapping[str, float]:
        """Weights of the branches' losses at an update (counted over the whole run)."""
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
    """The stages of a schedule, in order; optimiser state and learning-rate schedule start anew with each."""
    first, second = options.localization_steps, options.reasoning_steps
    match options.schedule:
        case "staged":
            return (
                Stage(LOCALIZATION, 0, first),
                Stage(REASONING, first, second, share=options.localization_share),
            )
        case "reversed":
            return (Stage(REASONING, 0, second), Stage(LOCALIZATION, second, first))
        case "localization-only":
            return (Stage(LOCALIZATION, 0, first),)
        case "reasoning-only":
            return (Stage(REASONING, 0, second),)
        case "dense":
            return (Stage("dense", 0, first + second, dense=True),)
        case "alternating" | "joint":
            return (Stage(options.schedule, 0, first + second),)
    raise ValueError(f"unknown schedule {options.schedule!r}")


def stage_at(stages: tuple[Stage, ...], step: int) -> tuple[int, Stage]:
    """Number (from 0) and stage of an update."""
    for number, stage in enumerate(stages):
        if stage.start <= step < stage.start + stage.steps:
            return number, stage
    raise ValueError(f"update {step} lies outside the run of {stages[-1].start + stages[-1].steps}")
