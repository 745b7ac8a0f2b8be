"""Token selectors: ours, the published rivals and the controls, all at any budget.

Read `base.py` first (what a selector is given and returns), then `places.py` (chance, an even grid, boxes).
`spread.py` has the greedy orders that several selectors use. A selector is a function with `@selector(title=...)` in a
file of this folder, or in a module that an entry point of the group `vitos.selectors` names. No list names it.

    selector = SELECTORS["divprune"]
    selector.refusal(backbone)            # what the model lacks, as a sentence, or None
    choice = selector.choose(task, count)
"""

from __future__ import annotations

from vitos.core.registry import Registry
from vitos.eval.selectors.base import Choice, Selector, SelectorTable, Task, selector

SELECTORS = SelectorTable(Registry("vitos.eval.selectors", "vitos.selectors", helpers=("base", "spread")))
"""All selectors by name, in the order in which they are run and listed."""

__all__ = ["SELECTORS", "Choice", "Selector", "SelectorTable", "Task", "selector"]
