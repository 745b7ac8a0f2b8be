"""Which process asks which questions of an update, and what the processes wait for.

Processes meet after the rollouts, so an update takes as long as the process that writes most. A question's number of
tokens is not known before it has been asked, but a question that took long once takes long again. Each process keeps
the same number of questions, so that nothing else depends on who asks what.

Questions are not handed out while others are still written: an engine that writes few completions at a time takes
nearly as long per token as one that writes many, so small portions would cost more than the waiting that they save.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from accelerate import Accelerator

from vitos.core.record import Record
from vitos.rl.distributed import gathered
from vitos.rl.rollout import QuestionGroup

T = TypeVar("T")


def share_out(costs: Sequence[float], processes: int) -> list[list[int]]:
    """The items that each process takes: as many as any other, and nearly the same sum of costs.

    The most expensive item first, each goes to the process with the smallest sum so far that has room ("longest
    processing time", Graham 1969). Equal costs leave the items in blocks, as they come.

    Args:
        costs: cost of each item; their number is a multiple of the number of processes.
        processes: number of processes.

    Returns:
        Indices of items for each process, in rising order.

    Example:
        >>> share_out([9.0, 8.0, 1.0, 2.0], 2)
        [[0, 2], [1, 3]]
    """
    size = len(costs) // processes
    if len(set(costs)) < 2:
        return [list(range(size * p, size * (p + 1))) for p in range(processes)]
    taken: list[list[int]] = [[] for _ in range(processes)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        free = [p for p in range(processes) if len(taken[p]) < size]
        taken[min(free, key=lambda p: (sum(costs[i] for i in taken[p]), p))].append(item)
    return [sorted(items) for items in taken]


@dataclass
class QuestionShares:
    """Shares out the questions of each update, from the lengths of earlier completions.

    Attributes:
        lengths: number of tokens of the latest completions of each question, by the record's id.
        order: for the latest update, the number of each question of the first process, the second, and so on.
    """

    lengths: dict[str, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def take(self, accelerator: Accelerator, records: Sequence[Record]) -> list[Record]:
        """This process's share of the questions of all processes; all of them call it together.

        A question that has not been asked yet counts like the average of those that have.
        """
        everything = gathered(accelerator, list(records))
        known = [self.lengths[record.id] for record in everything if record.id in self.lengths]
        typical = statistics.fmean(known) if known else 0.0
        costs = [float(self.lengths.get(record.id, typical)) for record in everything]
        shares = share_out(costs, accelerator.num_processes)
        self.order = [index for share in shares for index in share]
        return [everything[index] for index in shares[accelerator.process_index]]

    def in_order(self, items: Sequence[T]) -> list[T]:
        """What all processes made of their shares, gathered, in the order of the questions before they were shared."""
        return [item for _, item in sorted(zip(self.order, items, strict=True), key=lambda pair: pair[0])]

    def note(self, groups: Iterable[QuestionGroup]) -> None:
        """Remember the lengths of an update's completions, of all processes."""
        for group in groups:
            answers = [rollout for row in group.reasonings for rollout in row]
            self.lengths[group.record.id] = sum(len(r.completion.token_ids) for r in group.localizations + answers)
