"""Further questions in the place of those whose groups carry no signal ("dynamic sampling", DAPO, arXiv 2503.14476).

A group whose outcomes are all equal teaches nothing (`advantages.py:informative`), so an update of P questions has
fewer that count, and ever fewer as the policy gets better. Here as many further questions are rolled out as are
lacking, in at most so many rounds. Where DAPO goes on in the order of the epoch, further questions are drawn at random
from the seed of the run and the number of the update alone: the sampler stays where it is, so a resumed run draws
what the uninterrupted one does, every question still comes once an epoch in its turn, and a run in several processes
asks what one process would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from accelerate import Accelerator

from vitos.core.record import Record
from vitos.engines.base import derive_seed
from vitos.rl.distributed import gathered
from vitos.rl.rollout import QuestionGroup, RolloutBatch


def roll_out_until_full(
    accelerator: Accelerator,
    records: Sequence[Record],
    roll: Callable[[Sequence[Record]], RolloutBatch],
    count: Callable[[Sequence[QuestionGroup]], int],
    further: Callable[[Collection[str]], Iterator[Record]],
    rounds: int,
) -> list[RolloutBatch]:
    """This process's rollouts: of its own questions, then of each round of further ones, which may be empty.

    All processes call it together. They share out each round's questions in their order, each taking as many as it
    lacks, so that all of them together ask what one process would.

    Args:
        records: the questions of this process.
        roll: makes rollouts of questions.
        count: how many groups carry signal.
        further: questions to go on with, given the ids of all that were asked; alike in all processes.
        rounds: at most; 0 asks nobody.
    """
    batches = [roll(records)]
    if rounds == 0:
        return batches
    candidates = further(set(gathered(accelerator, [record.id for record in records])))
    lacking = len(records) - count(batches[0].groups)
    for _ in range(rounds):
        everywhere = gathered(accelerator, [lacking])
        drawn = list(itertools.islice(candidates, sum(everywhere)))
        if not drawn:
            break
        start = sum(everywhere[: accelerator.process_index])
        own = drawn[start : start + lacking]
        batches.append(roll(own) if own else RolloutBatch([], [], []))
        lacking -= count(batches[-1].groups)
    return batches


def further_questions(dataset: Sequence[Record], asked: Collection[str], seed: int, step: int) -> Iterator[Record]:
    """The questions of a data set that an update has not asked, each once, in an order of the seed and the update."""
    order = np.random.default_rng(derive_seed(seed, step, "oversampling")).permutation(len(dataset))
    return (dataset[i] for i in order.tolist() if dataset[i].id not in asked)


def joined(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Several batches as one, in their order."""
    return RolloutBatch(
        [group for batch in batches for group in batch.groups],
        [prompt for batch in batches for prompt in batch.localize_prompts],
        [prompt for batch in batches for prompt in batch.reason_prompts],
    )
