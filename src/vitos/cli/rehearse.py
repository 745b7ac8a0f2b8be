"""`vitos train --dry-run`: what a run would refuse, found without training and without opening an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from vitos.cli.resume import check_resumed
from vitos.cli.run import extra_rewards, load_policy, read_training_records, refuse_other_run
from vitos.config.recipe import Recipe
from vitos.core.record import Record
from vitos.eval.sources import is_benchmark
from vitos.policy.locate import resolve_model_path
from vitos.policy.plans import check_recipe
from vitos.rl.config import bf16_problem, check_trainer_fields
from vitos.rl.evidence_head import join_head
from vitos.rl.freezing import freeze_others
from vitos.rl.trainer import too_few_questions

SMALL = 1 << 30
"""Largest size of a model's weights, in bytes, that a dry run loads."""


def rehearse(recipe: Recipe, *, resume: bool = False) -> list[str]:
    """Refuse what the run would refuse; returns what could not be checked here, a sentence each.

    Args:
        resume: whether the run is to go on.

    Raises:
        ConfigError, DataError, ValueError, OSError: as the run would.
    """
    check_recipe(recipe)
    check_trainer_fields(recipe.trainer)
    extra_rewards(recipe)
    run = Path(recipe.output_dir)
    refuse_other_run(run, resume)
    notes = [*_data(recipe, run, resume), *_model(recipe)]
    if problem := bf16_problem(recipe.train.bf16, use_cpu=bool(recipe.trainer.get("use_cpu"))):
        notes.append(f"On this machine the run would stop: {problem}")
    return notes


def _data(recipe: Recipe, run: Path, resume: bool) -> Iterator[str]:
    data = recipe.data
    named = (*data.train, *(source for source in data.eval if not is_benchmark(source)))
    missing = [source for source in named if is_benchmark(source) or not Path(source).exists()]
    if missing:
        yield f"Not checked, since it is not here or not a file: {', '.join(missing)}."
        return
    records: list[Record] = read_training_records(recipe)
    if problem := too_few_questions(len(records), recipe.train.questions_per_step):
        raise ValueError(problem)
    if resume:
        check_resumed(run, recipe, records)
    yield "Records were read, images were not opened: vitos data check does."


def _model(recipe: Recipe) -> Iterator[str]:
    """Names of weights, where the model is here and small enough to be loaded at once."""
    patterns = recipe.train.unfrozen_parameters
    if patterns is None:
        return
    try:
        folder = Path(resolve_model_path(recipe.model.path))
    except OSError as error:
        yield f"train.unfrozen_parameters was not checked: {error}"
        return
    if not folder.is_dir() or sum(file.stat().st_size for file in folder.glob("*.safetensors")) > SMALL:
        yield f"train.unfrozen_parameters was not checked: {recipe.model.path} is not here, or too large to load."
        return
    policy = load_policy(recipe, torch.device("cpu"))
    join_head(policy, sharded=bool(recipe.trainer.get("fsdp")))
    freeze_others(policy.backbone, patterns)
