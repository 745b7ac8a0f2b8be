"""What the processes of `python -m benchmarks train` share: the job, the clock, and taking turns."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.peak import peak_of_process
from vitos.core.stopwatch import Stopwatch

P = ParamSpec("P")
T = TypeVar("T")
Way = Literal["shared", "own prompts", "unshared", "trl"]
STEP = "@step "
STEPS_OF_A_TURN = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One process's work.

    Attributes:
        shape: a name of `SHAPES`.
        group: G = K.
        questions: of a step.
        tokens: of every completion.
        micro_batch_tokens: padded tokens of one forward pass in the update.
        steps: to make.
    """

    shape: str
    way: Way
    group: int
    questions: int
    tokens: int
    micro_batch_tokens: int
    steps: int

    @property
    def completions(self) -> int:
        """Of a step, both branches."""
        return self.questions * self.group * (1 + self.group)


class Meter(Stopwatch):
    """Seconds by stage, and prompt tokens that ran through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_tokens = 0

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """`function` with its time added to a stage."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.span(name):
                return function(*args, **kwargs)

        return call


class Turns(TrainerCallback):
    """Waits for a line before every turn of `STEPS_OF_A_TURN` steps and writes what its last one took.

    The steps before it warm up what went cold while others had their turns (caches, pages that the system took back).
    """

    def __init__(self, job: Job, meter: Meter) -> None:
        self.job, self.meter = job, meter
        self._step: AbstractContextManager[None] = nullcontext()
        self._cpu = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % STEPS_OF_A_TURN == 0 and not sys.stdin.readline():
            raise SystemExit("whoever measured is gone")
        self.meter.seconds.clear()
        self.meter.prompt_tokens = 0
        self._step, self._cpu = self.meter.span("total"), time.process_time()
        self._step.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._step.__exit__(None, None, None)
        if state.global_step % STEPS_OF_A_TURN != 0:  # counted from 1 here
            return
        figures = {
            **self.meter.seconds,
            "cpu": time.process_time() - self._cpu,
            "prompt_tokens": self.meter.prompt_tokens,
            "completion_tokens": self.job.completions * self.job.tokens,
            "peak_mib": peak_of_process(),
        }
        print(STEP + json.dumps(figures), flush=True)


def noise(text: str) -> float:
    """A reward in 0..1 that tells any two texts apart, so that gradients are none of zeros."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 255
