"""Further questions to replace those whose groups carry no signal ("dynamic sampling", DAPO, arXiv 2503.14476).

A group whose outcomes are all equal teaches nothing (`advantages.py:informative`). So an update of P questions learns
from fewer than P, and from ever fewer as the policy gets better. Here the missing number of further questions is
rolled out, in a limited number of rounds. DAPO takes them in the order of the epoch. Here they are drawn at random
from the run's seed and the number of the update alone. The sampler of the epoch does not move, so a resumed run draws
the same questions as an uninterrupted one, each question still comes once per epoch in its turn, and several
processes ask the same questions as one.
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
    """The rollouts of this process: first its questions, then each round of further ones, which may be empty.

    All processes call it together. They share the questions of each round in order, and each takes as many as it
    lacks, so that all of them together ask the same questions as one process.

    Args:
        accelerator: the processes.
        records: the questions of this process.
        roll: a function that makes the rollouts of questions.
        count: a function that counts the groups with signal.
        further: a function from the ids of all questions asked so far to further ones; the same in all processes.
        rounds: largest number of rounds; 0 for no further questions.
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
    """The questions of a data set that an update has not asked, each once, in an order drawn from seed and update."""
    order = np.random.default_rng(derive_seed(seed, step, "oversampling")).permutation(len(dataset))
    return (dataset[i] for i in order.tolist() if dataset[i].id not in asked)


def joined(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Several batches as one batch, in their order."""
    return RolloutBatch(
        [group for batch in batches for group in batch.groups],
        [prompt for batch in batches for prompt in batch.localize_prompts],
        [prompt for batch in batches for prompt in batch.reason_prompts],
    )
