"""`DualStreamConfig`: the recipe's training options as `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from vitos.config.options import DualStreamOptions
from vitos.rl.combinations import refusals


@dataclass
class DualStreamConfig(DualStreamOptions, TrainingArguments):  # type: ignore[misc]
    """All fields of `DualStreamOptions`, where they are documented, and of `transformers.TrainingArguments`.

    `max_steps` and the batch size follow from the options. Settings of the loop that do not go with the dual stream,
    such as dropping columns, are switched off.

    >>> config = DualStreamConfig(output_dir="runs/mine", localization_steps=20, reasoning_steps=30, use_cpu=True)
    >>> config.max_steps, config.num_localizations
    (50, 4)

    Raises:
        ValueError: for values out of range, and for combinations that contradict each other.
    """

    def __post_init__(self) -> None:
        self.validate()
        self.max_steps = self.total_steps
        self.remove_unused_columns = False
        self.dataloader_drop_last = True
        self.save_strategy = "steps"
        self.logging_strategy = "steps"
        self.logging_first_step = True
        self.dataloader_pin_memory = False  # records are not tensors
        if self.disable_tqdm is None:
            self.disable_tqdm = False  # Trainer would drop the bar when its messages are silenced
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1: a step's questions are questions_per_step, and its memory is "
                "bounded by micro_batch_tokens, without changing the result"
            )
        if problem := bf16_problem(self.bf16, use_cpu=self.use_cpu):
            raise ValueError(problem)
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs; start one process per GPU with `accelerate launch` (see "
                "recipes/accelerate), or make one visible (CUDA_VISIBLE_DEVICES=0)"
            )
        for _, why in refusals(self, processes=self.world_size):
            raise ValueError(why)
        self.per_device_train_batch_size = self.questions_per_step // self.world_size

    @classmethod
    def from_options(cls, options: DualStreamOptions, output_dir: str, **trainer: Any) -> DualStreamConfig:
        """The configuration of a recipe's `train` and `trainer` sections.

        Raises:
            ValueError: for a `trainer` key that `transformers.TrainingArguments` does not have.
        """
        check_trainer_fields(trainer)
        own = {field.name: getattr(options, field.name) for field in fields(DualStreamOptions)}
        return cls(**own, output_dir=output_dir, **trainer)


def check_trainer_fields(trainer: Mapping[str, Any]) -> None:
    """Refuse keys of a recipe's `trainer` section that `transformers.TrainingArguments` does not have.

    Raises:
        ValueError: for the first of them.
    """
    if unknown := sorted(set(trainer) - {field.name for field in fields(TrainingArguments)}):
        raise ValueError(f"trainer.{unknown[0]} is not a field of transformers.TrainingArguments")


def bf16_problem(bf16: bool, *, use_cpu: bool = False) -> str:
    """Why `train.bf16` cannot be used on this machine; empty if it can, or is not asked for."""
    if not bf16 or use_cpu or torch.accelerator.is_available():
        return ""
    return "train.bf16 computes on a GPU, and PyTorch finds none here; set train.bf16=false to train on the CPU"
