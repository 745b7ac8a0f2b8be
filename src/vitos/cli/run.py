"""From a recipe to a trained, evaluated and reported model: what `vitos train` and `vitos eval` do.

A run folder holds `recipe.yaml` (every value, defaults filled in), the trainer's files (see `DualStreamTrainer`), and
after the evaluation `results.json`, `cases.jsonl`, `report.html` and the model card beside the final model. Each step
leaves a complete folder or file behind, so `resume` goes on where a kill left off.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from tqdm.auto import tqdm

from vitos import __version__
from vitos.config.recipe import ModelSection, Recipe, dump_recipe
from vitos.config.shipped import origin_of
from vitos.core.record import Record
from vitos.core.sparsify import Fusion, KeepRule
from vitos.core.stopwatch import Stopwatch
from vitos.data.check import check_dataset
from vitos.data.files import atomic_write, write_json_atomic, write_text_atomic
from vitos.data.readers import read_records
from vitos.eval.evaluate import EvaluationPlan, run_policy
from vitos.eval.results import summarize
from vitos.policy.plans import check_recipe
from vitos.policy.vlm import SparseVLM
from vitos.reports.card import model_card
from vitos.reports.html import write_report
from vitos.reports.table import results_table
from vitos.rl.callbacks import METRICS_FILE, read_metrics
from vitos.rl.checkpoint import complete_checkpoints, is_complete, staged_folder
from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.sft import warm_start
from vitos.rl.trainer import FINAL, DualStreamTrainer
from vitos.rl.user_rewards import load_reward
from vitos.scans.cache import EmbeddingCache

WARM_START = "warm_start"
RESULTS, CASES, REPORT, RECIPE = "results.json", "cases.jsonl", "report.html", "recipe.yaml"


@dataclass(frozen=True)
class Evaluation:
    """What is compared with what.

    Attributes:
        checkpoint: the trained model.
        data: record files, each a data set of its own.
        base: the model before training, or None: no dense accuracy to relate to.
        rl_dense: a model trained without pruning, or None.
        limit: the first so many questions of each file.
        load: options of `SparseVLM.from_pretrained`, the same for all models, so that they see the same pixels.
        cache: folder of an embedding cache that fits the encoders of all models, or None.
        answer_by: plan of `vitos.policy.plans` by which the models answer; None: the checkpoint's own.
    """

    name: str
    checkpoint: str
    data: tuple[str, ...]
    plan: EvaluationPlan
    base: str | None = None
    rl_dense: str | None = None
    limit: int | None = None
    bootstrap_samples: int = 10_000
    load: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    answer_by: str | None = None


# --- training -------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Check the data, start warm if asked to, train, evaluate; returns the run folder.

    In several processes (`accelerate launch`) all of them train; the first alone starts warm, evaluates and writes.

    Raises:
        DataError, ConfigError, CheckpointError, CacheError: before anything is trained where that can be known.
    """
    check_recipe(recipe)
    run = Path(recipe.output_dir)
    config = DualStreamConfig.from_options(recipe.train, str(run), **recipe.trainer)
    processes = PartialState()
    console = console or Console(quiet=not processes.is_main_process)
    if not resume and (complete_checkpoints(run) or is_complete(run / FINAL)):
        raise FileExistsError(f"{run} holds a run; pass --resume to go on with it, or set another output_dir")
    for source in (*recipe.data.train, *recipe.data.eval):
        require_file(source)
        check_dataset(source).raise_if_errors()
    records = _read(recipe.data.train, recipe.data.limit_train)
    # A model that is to be sharded need not fit on one device.
    device = torch.device("cpu") if config.fsdp else config.device
    policy = load_policy(recipe, device)
    cache = EmbeddingCache.open(recipe.data.cache, policy.backbone) if recipe.data.cache else None
    run.mkdir(parents=True, exist_ok=True)
    if processes.is_main_process:
        write_text_atomic(run / RECIPE, dump_recipe(recipe))

    base = recipe.model.path
    if recipe.warm_start is not None:
        base = str(run / WARM_START)
        with processes.main_process_first():
            if processes.is_main_process and not (resume and is_complete(run / WARM_START)):
                console.print(f"[bold]Warm start[/bold]: {recipe.warm_start.steps} supervised updates")
                warm_start(policy, records, recipe.warm_start)
                with staged_folder(run / WARM_START) as staging:
                    policy.save_pretrained(staging)
            else:
                started = dataclasses.replace(recipe.model, path=base)
                policy = load_policy(dataclasses.replace(recipe, model=started), device)

    if not (resume and is_complete(run / FINAL)):
        console.print(f"[bold]Dual stream[/bold]: {recipe.train.schedule}, {recipe.train.total_steps} updates")
        trainer = DualStreamTrainer(
            policy,
            config,
            records,
            reward_weights=reward_weights(recipe),
            reward_funcs=extra_rewards(recipe),
            lora=_lora(recipe),
            cache=cache,
        )
        trainer.train(resume_from_checkpoint=resume or None)
    if recipe.data.eval and processes.is_main_process:
        if processes.num_processes > 1 and config.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)  # the others are done
        evaluate(
            _evaluation(recipe, base),
            run,
            metrics=read_metrics(run / METRICS_FILE),
            recipe=recipe,
            console=console,
        )
    return run


def _evaluation(recipe: Recipe, base: str) -> Evaluation:
    """Of the recipe's final model beside `base`."""
    return Evaluation(
        name=recipe.name,
        checkpoint=str(Path(recipe.output_dir) / FINAL),
        data=recipe.data.eval,
        base=base,
        limit=recipe.data.limit_eval,
        bootstrap_samples=recipe.evaluate.bootstrap_samples,
        load=load_options(recipe.model),
        cache=recipe.data.cache,
        plan=EvaluationPlan(
            controls=recipe.evaluate.controls,
            budgets=recipe.evaluate.budgets,
            batch_size=recipe.evaluate.batch_size,
            max_localization_tokens=recipe.train.max_localization_tokens,
            max_reasoning_tokens=recipe.train.max_reasoning_tokens,
            seed=recipe.seed,
        ),
    )


def load_policy(recipe: Recipe, device: torch.device | None = None) -> SparseVLM:
    """The recipe's model, with the recipe's sparsification in its spec; by default on the GPU if there is one."""
    model, sparse = recipe.model, recipe.sparsify
    policy = SparseVLM.from_pretrained(model.path, device=device, **load_options(model))
    return policy.with_spec(
        keep=KeepRule(sparse.margin, sparse.min_tokens),
        fusion=Fusion(sparse.fusion, sparse.beta),
        positions=sparse.positions,
        plan=sparse.plan,
        coordinates=model.coordinates or policy.spec.coordinates,
    )


def load_options(model: ModelSection) -> dict[str, Any]:
    """How the recipe's models are loaded, for `SparseVLM.from_pretrained`."""
    names = ("dtype", "attn_implementation", "trust_remote_code", "min_pixels", "max_pixels")
    return {name: getattr(model, name) for name in names}


def require_file(source: str) -> None:
    """Check that a record file exists if a shipped recipe names it; other sources are left to whoever reads them.

    Raises:
        FileNotFoundError: says how to get the file.
    """
    if not Path(source).exists() and (remedy := origin_of(source)):
        raise FileNotFoundError(f"{source}: there is no such file; {remedy}")


def recipe_images(recipe: Recipe) -> list[Path]:
    """Every image that training and evaluation of a recipe open, each once, in the order of the files."""
    for source in (*recipe.data.train, *recipe.data.eval):
        require_file(source)
    records = _read(recipe.data.train, recipe.data.limit_train)
    for source in recipe.data.eval:
        records += read_records(source, limit=recipe.data.limit_eval)
    return list(dict.fromkeys(path for record in records for path in record.image_paths))


def reward_weights(recipe: Recipe) -> RewardWeights:
    """Weights of the built-in terms."""
    rewards = recipe.rewards
    return RewardWeights(rewards.format, rewards.iou, rewards.accuracy, rewards.feedback)


def extra_rewards(recipe: Recipe) -> list[ExtraReward]:
    """The user's rewards, imported from their files."""
    return [ExtraReward(e.name, load_reward(e.function), e.weight, e.branch) for e in recipe.rewards.extra]


def _lora(recipe: Recipe) -> Any:
    if recipe.model.lora is None:
        return None
    from peft import LoraConfig

    section = recipe.model.lora
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(
    evaluation: Evaluation,
    out: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    recipe: Recipe | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer all questions, write `results.json`, `cases.jsonl` and `report.html` to `out`, print the table."""
    console = console or Console()
    policy = SparseVLM.from_pretrained(evaluation.checkpoint, **evaluation.load)
    policy = policy.with_spec(plan=evaluation.answer_by or policy.spec.plan)
    base = rl_dense = None
    if evaluation.base:
        base = SparseVLM.from_pretrained(evaluation.base, spec=policy.spec, **evaluation.load)
    if evaluation.rl_dense:
        rl_dense = SparseVLM.from_pretrained(evaluation.rl_dense, **evaluation.load)
    watch, base_watch = Stopwatch(), Stopwatch()
    sets = {source: read_records(source, limit=evaluation.limit) for source in evaluation.data}
    cases: list[dict[str, Any]] = []
    with tqdm(total=sum(map(len, sets.values())), unit="question", desc="evaluate", dynamic_ncols=True) as bar:
        for source, records in sets.items():
            answered = run_policy(
                policy,
                records,
                evaluation.plan,
                base=base,
                rl_dense=rl_dense,
                watch=watch,
                base_watch=base_watch,
                progress=lambda done: bar.update(done),
                cache=evaluation.cache,
            )
            cases += [{"dataset": source, **case.to_json()} for case in answered]
    results = {
        "name": evaluation.name,
        "seed": evaluation.plan.seed,
        "dataset": ", ".join(evaluation.data),
        "checkpoint": evaluation.checkpoint,
        "base": evaluation.base,
        "plan": policy.spec.plan,
        "vitos_version": __version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **summarize(cases, bootstrap_samples=evaluation.bootstrap_samples, seed=evaluation.plan.seed),
        "seconds_by_stage": _seconds(watch, base_watch if base else None, len(cases)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        case["image"] = os.path.relpath(case["image"], out)
    with atomic_write(out / CASES) as path:
        path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    write_json_atomic(out / RESULTS, results)
    write_report(out, results, cases, metrics)
    if recipe is not None:
        card = model_card(results, dataclasses.asdict(recipe), evaluation.base or recipe.model.path)
        write_text_atomic(Path(evaluation.checkpoint) / "README.md", card)
    console.print(results_table(results))
    console.print(f"Report: {out / REPORT}")
    return results


def _seconds(watch: Stopwatch, base: Stopwatch | None, questions: int) -> dict[str, float | None]:
    """Seconds per question of every stage of the two passes, their total, and the base model's dense pass."""
    branches = ("localize_prefill", "localize_decode", "sparsify", "reason_prefill", "reason_decode")
    names = ("vision", "prefix", *branches)
    seconds: dict[str, float | None] = {name: watch.seconds.get(name, 0.0) / questions for name in names}
    seconds["total"] = sum(value for value in seconds.values() if value is not None)
    seconds["dense_total"] = sum(base.seconds.values()) / questions if base is not None else None
    return seconds


def _read(sources: Sequence[str], limit: int | None) -> list[Record]:
    """Records of several files; ids get their file in front, since two files may use the same ones."""
    records = [
        dataclasses.replace(record, id=f"{source}:{record.id}") if len(sources) > 1 else record
        for source in sources
        for record in read_records(source)
    ]
    return records[:limit]
