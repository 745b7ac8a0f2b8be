"""What a bench runs: conditions by name, batches that are the same however the run is cut or shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitos.core.record import Record
from vitos.eval.scoring import Protocol
from vitos.eval.selectors import SELECTORS

LOCALIZE, DENSE = "localize", "dense"
OWN = "own"  # the budget of as many tokens as the policy's own boxes keep, question by question
AT_OWN_BUDGET = ("policy", "random", "inverted")
LOOKS = {
    "blank": "Blank image",
    "shuffled": "Another question's image",
    "evidence_hidden": "Evidence painted over",
    "surroundings_hidden": "Surroundings painted over",
}
BUDGETS = (1.0, 0.77, 0.5, 0.25, 0.1)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is asked of every model on every benchmark.

    Attributes:
        selectors: names of `SELECTORS`.
        insist: a model that lacks what one of them needs is an error; otherwise that selector is left out of it.
        budgets: shares of the first image's visual tokens, 0..1; at 1 all selectors are the dense condition.
        looks: also answer from images that should take the answer away, or leave it ("does it look?").
        protocol: which questions are asked, see `eval/scoring.py`.
        batch_size: questions decoded together; those about the same image always are.
        max_localization_tokens, max_reasoning_tokens: longest responses.
        seed: of random tokens and shuffled images.
    """

    selectors: tuple[str, ...] = tuple(SELECTORS)
    insist: bool = True
    budgets: tuple[float, ...] = BUDGETS
    looks: bool = True
    protocol: Protocol = "choice"
    batch_size: int = 64
    max_localization_tokens: int = 256
    max_reasoning_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.selectors if name not in SELECTORS]:
            raise ValueError(f"there is no selector {unknown[0]!r}; known are {', '.join(SELECTORS)}")
        if bad := [budget for budget in self.budgets if not 0 < budget <= 1]:
            raise ValueError(f"a budget is a share of the visual tokens in (0, 1], got {bad[0]}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of all conditions, in the order in which they are run."""
        own = [f"{name}@{OWN}" for name in AT_OWN_BUDGET if name in self.selectors]
        fixed = [
            condition_name(s, b) for b in sorted(set(self.budgets), reverse=True) for s in self.selectors if b < 1
        ]
        looks = list(LOOKS) if self.looks else []
        boxed = own or looks or any("boxes" in SELECTORS[name].needs for name in self.selectors)
        return (*([LOCALIZE] if boxed else []), DENSE, *own, *fixed, *looks)


@dataclass(frozen=True, slots=True)
class BenchSet:
    """One benchmark: its questions, and how many rows of the release are left out of it."""

    name: str
    records: tuple[Record, ...]
    left_out: int = 0


def condition_name(selector: str, budget: float) -> str:
    """`divprune@0.25`."""
    return f"{selector}@{budget:g}"


def split_condition(condition: str) -> tuple[str, str]:
    """(selector, budget) of a condition; the dense one and the looks have the budget 1."""
    selector, _, budget = condition.partition("@")
    return selector, budget or "1"


def batches(records: Sequence[Record], size: int) -> list[list[Record]]:
    """Questions in batches of about `size`: all questions about the same image(s) together, images in their order.

    They depend on the records and the size alone, so that answers do not depend on who answers which batch.
    """
    groups: dict[tuple[Path, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(record.image_paths, []).append(record)
    out: list[list[Record]] = []
    for group in groups.values():
        if out and len(out[-1]) + len(group) <= size:
            out[-1].extend(group)
        else:
            out.append(list(group))
    return out
