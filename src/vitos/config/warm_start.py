"""The recipe's `warm_start` section. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from vitos.config.options import FORBID_UNKNOWN, Bool, Count, CountOrZero, NotNegative, Number, Positive


@dataclass(frozen=True)
class WarmStartSection:
    """Supervised start on the training records, before RL or alone (`vitos sft`); see docs/training.md.

    Attributes:
        steps: number of updates, >= 1 (no warm start: `warm_start: null`).
        batch_size: number of examples per update, over all processes.
        learning_rate: peak learning rate.
        weight_decay: weight decay of AdamW.
        warmup_share: share of the steps with a rising learning rate, 0 <= share < 1.
        seed: seed of the order of the examples.
        train_encoder: also train the vision encoder, which the training itself leaves as it is.
        answer_weight: weight of the tokens of an answer; all others have weight 1.
        by_image: whether the questions about one image follow each other, so that the image runs once for them.
        save_steps: number of updates between checkpoints.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    steps: Count
    batch_size: Count = 32
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    warmup_share: Annotated[Number, Field(ge=0, lt=1)] = 0.06
    seed: CountOrZero = 0
    train_encoder: bool = False
    answer_weight: Positive = 1.0
    by_image: Bool = False
    save_steps: Count = 200
