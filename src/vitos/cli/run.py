"""From a recipe to a trained model with its evaluation and report: the work of `vitos train`.

A run folder contains `recipe.yaml` (all values, defaults filled in), the trainer's files (see `DualStreamTrainer`)
and, after the evaluation, `results.json`, `cases.jsonl`, `report.html` and the model card in the final model's folder.
Each step leaves a complete folder or file, so `resume` goes on after the last complete one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments

from vitos.cli.distill import add_head, head_options
from vitos.cli.resume import WARM_START, begin_run, check_resumed, is_trained
from vitos.cli.sft import lora_config, section_of, started, supervised_config, supervised_start
from vitos.config.recipe import ModelSection, Recipe
from vitos.config.shipped import origin_of
from vitos.core.record import Record
from vitos.core.sparsify import Fusion, KeepRule
from vitos.data.readers import record_files
from vitos.doctor.probe import Probe, probe
from vitos.engines.judge.judge import Judge
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import Evaluation, evaluate
from vitos.eval.sources import check_sources, is_benchmark, read_set
from vitos.policy.plans import check_recipe
from vitos.policy.vlm import SparseVLM
from vitos.reports.samples import draw_sample
from vitos.rl.callbacks import METRICS_FILE, read_metrics
from vitos.rl.checkpoint import complete_checkpoints, is_complete
from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.trainer import FINAL, DualStreamTrainer
from vitos.rl.user_rewards import load_reward
from vitos.scans.cache import EmbeddingCache

# --- training -------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Check the data, run the warm start if the recipe has one, train, evaluate; returns the run folder.

    In several processes (`accelerate launch`) all of them train; only the first one evaluates and writes.

    Args:
        recipe: the recipe.
        resume: whether to go on with a run that is in `output_dir`.
        console: the console to print to; None for standard output in the first process.

    Raises:
        DataError, ConfigError, CheckpointError, CacheError: before anything is trained, if it can be known then.
    """
    run = Path(recipe.output_dir)
    config = DualStreamConfig.from_options(recipe.train, str(run), **recipe.trainer)
    refuse_other_run(run, resume)
    console = console or _first_console()
    ready = _prepare(recipe, config, resume, console)
    policy, base, adapters, processes = ready.policy, recipe.model.path, None, PartialState()
    if recipe.warm_start is not None:
        _start(recipe, ready, resume, console)
        base = str(run / WARM_START)
        path, adapters = started(recipe)
        model = dataclasses.replace(recipe.model, path=path)
        policy = load_policy(dataclasses.replace(recipe, model=model), ready.device)

    if not (resume and is_trained(run, recipe)):
        console.print(f"[bold]Dual stream[/bold]: {recipe.train.schedule}, {recipe.train.total_steps} updates")
        trainer = DualStreamTrainer(
            policy,
            config,
            ready.records,
            reward_weights=reward_weights(recipe),
            reward_funcs=extra_rewards(recipe),
            lora=lora_config(recipe.model.lora),
            adapters=adapters,
            cache=ready.cache,
            draw=draw_sample,
            judge=Judge(recipe.judge) if recipe.judge is not None else None,
        )
        trainer.train(resume_from_checkpoint=resume or None)
    if recipe.evidence_head is not None and processes.is_main_process:
        section, options = recipe.evidence_head, head_options(recipe.evidence_head, recipe)
        add_head(run / FINAL, options, ready.records[: section.questions], final_options(recipe.model), console)
    if recipe.data.eval and processes.is_main_process:
        if processes.num_processes > 1 and config.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)  # the other processes have finished
        evaluate(
            _evaluation(recipe, base),
            run,
            metrics=read_metrics(run / METRICS_FILE),
            recipe=recipe,
            console=console,
        )
    return run


def start(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """The supervised start of a recipe alone, the work of `vitos sft`; returns the run folder.

    Arguments and errors as in `train`, which goes on from it with `resume`.
    """
    run, console = Path(recipe.output_dir), console or _first_console()
    config = supervised_config(recipe)
    if not resume and (is_complete(run / WARM_START) or complete_checkpoints(run)):
        raise FileExistsError(f"{run} holds a run; pass --resume to go on with it, or set another output_dir")
    _start(recipe, _prepare(recipe, config, resume, console), resume, console)
    return run


def probe_recipe(recipe: Recipe, questions: int) -> Probe:
    """Roll out some of a recipe's training questions with its model, before anything is trained."""
    check_recipe(recipe)
    for source in recipe.data.train:
        require_file(source)
    policy = load_policy(recipe)
    return probe(
        policy,
        read_training_records(recipe),
        recipe.train,
        reward_weights(recipe),
        extra_rewards(recipe),
        questions=questions,
        cache=EmbeddingCache.open(recipe.data.cache, policy.backbone) if recipe.data.cache else None,
    )


def _first_console() -> Console:
    """A console that prints in the first process only."""
    return Console(quiet=not PartialState().is_main_process)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ready:
    """What a training begins with."""

    policy: SparseVLM
    records: list[Record]
    cache: EmbeddingCache | None
    device: torch.device


def _prepare(recipe: Recipe, config: TrainingArguments, resume: bool, console: Console) -> _Ready:
    """Check the recipe and its data, and load the model; the first process writes what is about to be done."""
    check_recipe(recipe)
    if recipe.evidence_head is not None:
        head_options(recipe.evidence_head, recipe)  # its errors, before anything is trained
    run = Path(recipe.output_dir)
    _check_data(recipe, console)
    read = read_training_records(recipe)
    if resume:
        check_resumed(run, recipe, read)
    # A model that is to be sharded need not fit on one device.
    device = torch.device("cpu") if config.fsdp else config.device
    policy = load_policy(recipe, device)
    records = _fitting(policy, read, recipe, console)
    cache = EmbeddingCache.open(recipe.data.cache, policy.backbone) if recipe.data.cache else None
    if PartialState().is_main_process:
        begin_run(run, recipe, read)
    return _Ready(policy, records, cache, device)


def _start(recipe: Recipe, ready: _Ready, resume: bool, console: Console) -> None:
    """Run the supervised start, unless it is done and the run is resumed."""
    if not (resume and is_complete(Path(recipe.output_dir) / WARM_START)):
        console.print(f"[bold]Warm start[/bold]: {section_of(recipe).steps} supervised updates")
        supervised_start(recipe, ready.policy, ready.records, ready.cache, resume=resume)
    PartialState().wait_for_everyone()


def _evaluation(recipe: Recipe, base: str) -> Evaluation:
    """The evaluation of the recipe's final model, compared with `base`."""
    return Evaluation(
        name=recipe.name,
        checkpoint=str(Path(recipe.output_dir) / FINAL),
        data=recipe.data.eval,
        settings=Settings(
            batch_size=recipe.evaluate.batch_size,
            max_localization_tokens=recipe.train.max_localization_tokens,
            max_reasoning_tokens=recipe.train.max_reasoning_tokens,
            seed=recipe.seed,
        ),
        base=base,
        controls=recipe.evaluate.controls,
        budgets=recipe.evaluate.budgets,
        limit=recipe.data.limit_eval,
        bootstrap_samples=recipe.evaluate.bootstrap_samples,
        load=final_options(recipe.model),
        head_plan=recipe.evidence_head.plan if recipe.evidence_head is not None else None,
        cache=recipe.data.cache,
        judge=recipe.judge,
        metrics=recipe.evaluate.metrics,
    )


def _fitting(policy: SparseVLM, records: list[Record], recipe: Recipe, console: Console) -> list[Record]:
    """The training questions that are not longer than the model's context; the others are named and counted."""
    longest, branches = max(recipe.train.max_localization_tokens, recipe.train.max_reasoning_tokens), policy.branches
    left_out = {r.id: why for r in records if (why := branches.length_problem(r.question, r.kind, longest))}
    if left_out:
        first = next(iter(left_out))
        console.print(f"{len(left_out)} training questions are left out: {first}: {left_out[first]}", markup=False)
    return [record for record in records if record.id not in left_out]


def load_policy(recipe: Recipe, device: torch.device | None = None) -> SparseVLM:
    """The recipe's model with the recipe's sparsification in its spec; by default on the GPU if there is one."""
    model, sparse = recipe.model, recipe.sparsify
    policy = SparseVLM.from_pretrained(model.path, device=device, **load_options(model))
    return policy.with_spec(
        keep=KeepRule(sparse.margin, sparse.min_tokens, sparse.other_images),
        fusion=Fusion(sparse.fusion, sparse.beta),
        positions=sparse.positions,
        plan=sparse.plan,
        coordinates=model.coordinates or policy.spec.coordinates,
    )


def load_options(model: ModelSection) -> dict[str, Any]:
    """Options with which `SparseVLM.from_pretrained` loads the recipe's models."""
    names = ("dtype", "attn_implementation", "trust_remote_code", "min_pixels", "max_pixels", "quantization")
    return {name: getattr(model, name) for name in names}


def final_options(model: ModelSection) -> dict[str, Any]:
    """The same of the final model; adapters were merged in float32, onto what the 4 bits stood for."""
    return load_options(model) | ({"dtype": "auto", "quantization": None} if model.lora else {})


def _check_data(recipe: Recipe, console: Console) -> None:
    """Refuse data with errors, and say what is to be looked at, such as an image that is in two splits."""
    data = recipe.data
    sources, splits = data.splits
    for source in sources:
        require_file(source)
        if not is_benchmark(source):
            record_files(source)  # found before anything is decoded
    for report in check_sources(sources, splits):
        report.raise_if_errors()
        if warnings := report.of("warning"):
            console.print(f"{report.source}: {len(warnings)} warnings of `vitos data check`, first: {warnings[0]}")


def require_file(source: str) -> None:
    """Check that a record file exists if a shipped recipe names it; other sources are checked when they are read.

    Raises:
        FileNotFoundError: if it does not; the message says how to get the file.
    """
    if not is_benchmark(source) and not Path(source).exists() and (remedy := origin_of(source)):
        raise FileNotFoundError(f"{source}: there is no such file; {remedy}")


def recipe_images(recipe: Recipe) -> list[Path]:
    """All images that training and evaluation of a recipe open, each once, in the order of the files."""
    for source in (*recipe.data.train, *recipe.data.eval):
        require_file(source)
    records = read_training_records(recipe)
    for source in recipe.data.eval:
        records += read_set(source, recipe.data.limit_eval).records
    return list(dict.fromkeys(path for record in records for path in record.image_paths))


def reward_weights(recipe: Recipe) -> RewardWeights:
    """Weights of the recipe's built-in rewards."""
    rewards = recipe.rewards
    return RewardWeights(format=rewards.format, iou=rewards.iou, accuracy=rewards.accuracy, feedback=rewards.feedback)


def extra_rewards(recipe: Recipe) -> list[ExtraReward]:
    """The recipe's further rewards, imported from their files."""
    return [
        ExtraReward(e.name, load_reward(e.function), weight=e.weight, branch=e.branch, per=e.per)
        for e in recipe.rewards.extra
    ]


def read_training_records(recipe: Recipe) -> list[Record]:
    """Records of several files or benchmarks; each id is prefixed with its source: two may use the same ids."""
    sources = recipe.data.train
    records = [
        dataclasses.replace(record, id=f"{source}:{record.id}") if len(sources) > 1 else record
        for source in sources
        for record in read_set(source).records
    ]
    return records[: recipe.data.limit_train]


def refuse_other_run(run: Path, resume: bool) -> None:
    """Refuse the folder of another run, unless it is to be gone on with.

    Raises:
        FileExistsError: if it holds a checkpoint or a final model.
    """
    if not resume and (complete_checkpoints(run) or is_complete(run / FINAL)):
        raise FileExistsError(f"{run} holds a run; pass --resume to go on with it, or set another output_dir")
