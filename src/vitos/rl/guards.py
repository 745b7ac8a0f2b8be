"""Guards of a run: updates that are not finite are left out, and rewards earned the wrong way cause a warning."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainerState, TrainingArguments

from vitos.rl.callbacks import LogCallback

logger = logging.getLogger(__name__)

WINDOW = 10  # number of logs that a rate is averaged over
# Figure, limit, whether more (True) or less than the limit is bad, and the meaning of that.
_SIGNS = (
    (
        "fallback_rate",
        0.5,
        True,
        "of the localizations have no box that could be used: the reasoning sees the whole image instead of evidence. "
        "Look at samples/; raise rewards.format, start warm, or lengthen max_localization_tokens",
    ),
    (
        "parse_rate",
        0.5,
        False,
        "of the localizations have an <evidence> list that can be read. Look at samples/; raise rewards.format, or "
        "start warm",
    ),
    (
        "whole_image_rate",
        0.5,
        True,
        "of the localizations have a box around (nearly) the whole image, which says nothing about where the evidence "
        "is. Raise rewards.iou, and check that the training records have gold boxes",
    ),
    (
        "judge/unavailable_rate",
        0.5,
        True,
        "of the judge's grades could not be had, and their groups teach no accuracy. Look at the server, or give it "
        "more time (judge.seconds, judge.parallel)",
    ),
    (
        "judge/one_grade_rate",
        0.95,
        True,
        "of the graded groups have one grade for all answers, so nothing is learned from them. Ask for finer grades "
        "(judge.prompt), take another judge, or other questions",
    ),
    (
        "no_answer_rate",
        0.5,
        True,
        "of the reasonings end without an answer that could be read. Look at samples/; lengthen max_reasoning_tokens, "
        "or start warm",
    ),
)


def warn_of_small_dtype(network: torch.nn.Module, accelerator: Accelerator, learning_rate: float) -> None:
    """Warn if the trained weights are of a number format in which small steps round to nothing."""
    small = {p.dtype for p in network.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    sharded = accelerator.distributed_type == DistributedType.FSDP
    upcast = sharded and accelerator.mixed_precision != "no"
    if small and not upcast and learning_rate < 1e-4:
        logger.warning(
            "the trained weights are %s: most steps of learning_rate %g round to nothing on them. Load the model in "
            "float32 (model.dtype: float32; train.bf16 computes in bfloat16 all the same), or train adapters",
            ", ".join(str(dtype).removeprefix("torch.") for dtype in small),
            learning_rate,
        )


class UpdateGuard:
    """Leaves out updates whose loss or gradient is not finite.

    Args:
        most: largest number of consecutive updates to leave out; one more stops the run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_a_row = 0

    def admits(self, step: int, loss: float, norm: float, ids: Sequence[str]) -> bool:
        """Whether the update may change the weights.

        Raises:
            FloatingPointError: after too many consecutive updates that may not.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        what = f"the loss of update {step} is {loss} and the norm of its gradient {norm} (questions {list(ids)})"
        if self.in_a_row > self.most:
            raise FloatingPointError(
                f"{what}: {self.in_a_row} such updates in a row; lower learning_rate, or train in float32"
            )
        logger.warning("%s; the update is left out", what)
        return False


class CollapseWarning(LogCallback):
    """Warns once, with the remedy, if a rate of the last logs shows that rewards are earned the wrong way."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name, *_ in _SIGNS}
        self._said: set[str] = set()

    def on_figures(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        for name, limit, more_is_bad, meaning in _SIGNS:
            if name not in logs or name in self._said:
                continue
            values = self._seen[name]
            values.append(logs[name])
            mean = sum(values) / len(values)
            if len(values) == WINDOW and (mean > limit if more_is_bad else mean < limit):
                self._said.add(name)
                only = "" if more_is_bad else "only "
                logger.warning("update %d: %s%.0f %% %s", state.global_step, only, 100 * mean, meaning)
