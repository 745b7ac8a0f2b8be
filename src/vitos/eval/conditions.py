"""What is asked: conditions by name, and batches that are the same however a run is cut or shared out.

A *condition* is one way to answer: all tokens (`dense`), the policy's own boxes by its own plan (`policy@own`), a
token selector at a budget (`divprune@0.25`; `random@own` keeps as many tokens as the policy's own boxes did), a
control, or a changed image (`blank`). `localize` is the text of the localization branch, which `policy@own` writes
on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vitos.core.record import Record
from vitos.eval.controls import CONTROLS, ORACLE, at_budget
from vitos.eval.scoring import Protocol
from vitos.eval.selectors import SELECTORS

LOCALIZE, DENSE, OWN = "localize", "dense", "own"
OWN_BOXES = f"policy@{OWN}"
CONTROL = "control:"
BLANK = "blank"
ABLATIONS = {
    BLANK: "Blank image",
    "shuffled": "Another question's image",
    "evidence_hidden": "Evidence painted over",
    "surroundings_hidden": "Surroundings painted over",
}
BUDGETS = (1.0, 0.77, 0.5, 0.25, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for all models, data sets and conditions of a run.

    Attributes:
        protocol: protocol that decides which questions are asked (`eval/scoring.py`); None: all of them.
        batch_size: number of questions decoded together; questions about the same image are never separated.
        max_localization_tokens, max_reasoning_tokens: longest response of each branch.
        seed: seed of random tokens and shuffled images.
        positions: positions of kept tokens, "keep" or "renumber" (`VitosSpec`); None: as each model was trained.
    """

    protocol: Protocol | None = None
    batch_size: int = 64
    max_localization_tokens: int = 256
    max_reasoning_tokens: int = 256
    seed: int = 0
    positions: Literal["keep", "renumber"] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def told(self) -> dict[str, Any]:
        """All values as a run stores them; without positions where they are each model's, as older runs have it."""
        return {name: value for name, value in asdict(self).items() if name != "positions" or value}


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The questions of one data set.

    Attributes:
        name: name of the data set in the folder and the tables.
        records: the questions.
        left_out: rows of a release that cannot be asked, each with the reason.
    """

    name: str
    records: tuple[Record, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def bench_conditions(
    selectors: Sequence[str] | None = None, budgets: Sequence[float] = BUDGETS, *, ablations: bool = True
) -> tuple[str, ...]:
    """Selectors at budgets, in the order in which they are run.

    Example:
        >>> bench_conditions(["random"], [1.0, 0.25], ablations=False)
        ('localize', 'dense', 'random@own', 'random@0.25')

    Args:
        selectors: names of `SELECTORS`; None: all but the variants.
        budgets: shares of the visual tokens of all images, 0..1; at 1 every selector is the dense condition.
        ablations: also answer from images that should take the answer away, or leave it.

    Raises:
        ValueError: for an unknown selector or a budget out of range.
    """
    usual = (name for name, one in SELECTORS.items() if one.default)
    names = tuple(usual if selectors is None else dict.fromkeys(selectors))
    if unknown := [name for name in names if name not in SELECTORS]:
        raise ValueError(f"there is no selector {unknown[0]!r}; known are {', '.join(SELECTORS)}")
    _check(budgets)
    chosen = [SELECTORS[name] for name in names]
    own = sorted((one.own_budget, f"{one.name}@{OWN}") for one in chosen if one.own_budget is not None)
    fixed = [f"{name}@{budget:g}" for budget in sorted(set(budgets), reverse=True) for name in names if budget < 1]
    changed = list(ABLATIONS) if ablations else []
    boxed = own or changed or any("boxes" in one.needs for one in chosen)
    return (*([LOCALIZE] if boxed else []), DENSE, *(name for _, name in own), *fixed, *changed)


def control_conditions(
    budgets: Sequence[float] = (), *, controls: bool = True, text_only: bool = False
) -> tuple[str, ...]:
    """What `vitos eval` asks of the trained model: its own boxes, all tokens, controls, and controls at budgets.

    With `text_only`, also from a blank image: how far the words of the questions alone lead.

    Raises:
        ValueError: for a budget out of range.
    """
    _check(budgets)
    names = [*CONTROLS, ORACLE] if controls else []
    names += [name for budget in dict.fromkeys(budgets) for name in at_budget(budget)]
    return (LOCALIZE, OWN_BOXES, DENSE, *(f"{CONTROL}{name}" for name in names), *([BLANK] if text_only else ()))


def split_condition(condition: str) -> tuple[str, str]:
    """(selector, budget) of a condition; the dense one and changed images have the budget 1."""
    selector, _, budget = condition.partition("@")
    return selector, budget or "1"


def _check(budgets: Sequence[float]) -> None:
    if bad := [budget for budget in budgets if not 0 < budget <= 1]:
        raise ValueError(f"a budget is a share of the visual tokens in (0, 1], got {bad[0]}")


def batches(records: Sequence[Record], size: int) -> list[list[Record]]:
    """Questions in batches of about `size`: all questions about the same image(s) together, images in their order.

    They depend only on the records and the size, so answers do not depend on which process answers which batch.
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
