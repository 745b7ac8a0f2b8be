"""The supervised start of a recipe: the work of `vitos sft`, and the first part of `vitos train`.

A run folder gets `warm_start`, the policy as an ordinary checkpoint; with adapters also `warm_start_adapter`, from
which reinforcement learning trains on; and `sft`, with the figures of the updates and, until they are all done, with
checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainingArguments

from vitos.cli.resume import SFT, WARM_START, WARM_START_ADAPTER
from vitos.config.recipe import LoraSection, Recipe, WarmStartSection
from vitos.config.yaml_file import ConfigError
from vitos.core.record import Record
from vitos.policy.vlm import SparseVLM
from vitos.rl.callbacks import read_metrics
from vitos.rl.checkpoint import all_checkpoints, complete_checkpoints
from vitos.rl.sft import SFT_METRICS, SupervisedConfig, SupervisedTrainer
from vitos.scans.cache import EmbeddingCache


def section_of(recipe: Recipe) -> WarmStartSection:
    """The recipe's `warm_start`.

    Raises:
        ConfigError: if it has none.
    """
    if recipe.warm_start is None:
        raise ConfigError(recipe.name, ["warm_start: is null; set at least warm_start.steps"])
    return recipe.warm_start


def supervised_config(recipe: Recipe) -> SupervisedConfig:
    """The options of the supervised start.

    Raises:
        ConfigError: for a recipe without a warm start.
        ValueError: for a `trainer` key that `transformers.TrainingArguments` does not have.
    """
    section, train = section_of(recipe), recipe.train
    known = {field.name for field in fields(TrainingArguments)}
    if unknown := sorted(set(recipe.trainer) - known):
        raise ValueError(f"trainer.{unknown[0]} is not a field of transformers.TrainingArguments")
    return SupervisedConfig(
        output_dir=str(Path(recipe.output_dir) / SFT),
        max_steps=section.steps,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_share=section.warmup_share,
        seed=section.seed,
        answer_weight=section.answer_weight,
        by_image=section.by_image,
        train_encoder=section.train_encoder,
        unfrozen_parameters=train.unfrozen_parameters,
        micro_batch_tokens=train.micro_batch_tokens,
        max_grad_norm=train.max_grad_norm,
        max_skipped_updates=train.max_skipped_updates,
        bf16=train.bf16,
        logging_steps=train.logging_steps,
        save_steps=section.save_steps,
        save_total_limit=1,
        report_to=train.report_to,
        **recipe.trainer,
    )


def supervised_start(
    recipe: Recipe,
    policy: SparseVLM,
    records: Sequence[Record],
    cache: EmbeddingCache | None = None,
    *,
    resume: bool = False,
) -> None:
    """Train the policy on the records and write it; all processes call it together.

    Raises:
        FileExistsError: if an unfinished one is in the folder and is not to be resumed.
    """
    run, config = Path(recipe.output_dir), supervised_config(recipe)
    found = complete_checkpoints(run / SFT)
    if found and not resume:
        raise FileExistsError(f"{run / SFT} holds {found[-1].name}; pass --resume to go on, or set another output_dir")
    trainer = SupervisedTrainer(policy, config, records, lora=lora_config(recipe.model.lora), cache=cache)
    if found and found[-1].name == f"checkpoint-{config.max_steps}":
        trainer._load_from_checkpoint(str(found[-1]))  # all updates are done: Trainer would make one more
    else:
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    trainer.write(run / WARM_START, run / WARM_START_ADAPTER)
    if trainer.is_world_process_zero():
        for path in all_checkpoints(run / SFT):
            shutil.rmtree(path)


def started(recipe: Recipe) -> tuple[str, Path | None]:
    """The checkpoint to go on with after the start, and adapters to train on; None without adapters.

    With adapters it is the recipe's own model: merged weights would have to be held in float32.
    """
    run = Path(recipe.output_dir)
    if recipe.model.lora is None:
        return str(run / WARM_START), None
    return recipe.model.path, run / WARM_START_ADAPTER


def render_start(run: Path) -> Table:
    """The figures of a supervised start as a table."""
    rows = read_metrics(run / SFT / SFT_METRICS)
    seen = [row for row in rows if "loss" in row]
    tail = seen[-max(1, len(seen) // 10) :]
    table = Table(title=str(run / WARM_START), show_header=False, title_justify="left")
    table.add_row("updates", str(rows[-1]["step"] if rows else 0))
    if seen:
        table.add_row("loss, first update", f"{seen[0]['loss']:.3f}")
        table.add_row("loss, last tenth", f"{sum(row['loss'] for row in tail) / len(tail):.3f}")
        table.add_row("tokens learned", f"{sum(row['tokens'] for row in rows):,.0f}")
        table.add_row("updates left out", f"{sum(row['skipped_updates'] for row in rows):.0f}")
    return table


def lora_config(section: LoraSection | None) -> Any:
    """PEFT's options for the recipe's adapters; None without any."""
    if section is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )
