"""The answers of `vitos doctor --recipe`: whether a recipe fits, how long an update takes, and what would help."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from vitos.config.recipe import Recipe, load_recipe
from vitos.config.shipped import recipe_names
from vitos.doctor.advice import USABLE, memory_checks, sampler_checks, time_checks
from vitos.doctor.devices import DEVICES, Device, detected_device
from vitos.doctor.estimate import Memory, Precision, VllmShare, Workload, memory, trained_parameters
from vitos.doctor.machine import GIB, Check, checks_table, nearest_folder
from vitos.doctor.optimizers import state_bytes
from vitos.doctor.shapes import ModelShape, find_config, model_shape
from vitos.doctor.speed import Assumptions, seconds
from vitos.doctor.vllm_speed import WORKSPACE, most_sequences
from vitos.policy.locate import config_folder
from vitos.policy.plans import get_plan
from vitos.rl.combinations import fsdp_recomputes, refusals
from vitos.rl.schedule import make_stages

TEXT_TOKENS = 400
"""Length of a prompt without its image (chat template, instruction, question): an assumption; measure yours."""
SIXTEEN_BITS = 2
VLLM_UTILIZATION = 0.92
"""vLLM's default of `gpu_memory_utilization` (0.32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Updates that train the same branches.

    Attributes:
        name: the trained branches.
        steps: number of updates.
        seconds: seconds of one update, by part.
    """

    name: str
    steps: int
    seconds: Mapping[str, float]

    @property
    def hours(self) -> float:
        return self.steps * sum(self.seconds.values()) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The estimate of one recipe.

    Attributes:
        recipe: the recipe.
        shape: sizes of its model.
        work: the load of one device.
        device: kind of all devices.
        assumed: what is assumed of the device's speed.
        memory: bytes on one device.
        stages: the time of the updates, by trained branches.
        checks: what fits, what does not, and what to do about it.
    """

    recipe: Recipe
    shape: ModelShape
    work: Workload
    device: Device
    assumed: Assumptions
    memory: Memory
    stages: tuple[StageTime, ...]
    checks: tuple[Check, ...] = ()

    @property
    def hours(self) -> float:
        """Hours of all updates."""
        return sum(stage.hours for stage in self.stages)

    @property
    def decoding(self) -> float:
        """Share of the time that is decoding."""
        every = [(stage.steps * value, part) for stage in self.stages for part, value in stage.seconds.items()]
        return sum(value for value, part in every if part.startswith("decode")) / sum(value for value, _ in every)

    @property
    def usable(self) -> float:
        """Bytes of a device that PyTorch can use."""
        return USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable


def diagnose_recipe(
    recipe: Recipe,
    devices: int | None = None,
    device: Device | None = None,
    images: int | None = None,
    assumed: Assumptions = Assumptions(),
) -> Diagnosis:
    """Estimate a recipe.

    Args:
        recipe: the recipe.
        devices: number of processes, one per device; None: 8 for a sharded recipe, else 1.
        device: kind of the devices; None: the GPU of this machine, or without one an H100 of 80 GB.
        images: number of distinct training images; None: one for each question of all updates.
        assumed: what is assumed of the device's speed.

    Raises:
        ValueError: if the model's sizes are not known (see `find_config`).
    """
    config = find_config(recipe.model.path)
    shape = model_shape(config, recipe.model.max_pixels or _saved_limit(recipe.model.path))
    if recipe.model.attn_implementation != "sdpa":  # then the engine gives each sibling a copy of the prompt's keys
        shape = dataclasses.replace(shape, shares_prompt=False)
    devices = devices or (8 if recipe.trainer.get("fsdp") else 1)
    device = device or detected_device() or DEVICES["H100 80GB"]
    work = make_workload(recipe, shape, devices, str(getattr(config, "dtype", None)), device, images)
    found = Diagnosis(
        recipe=recipe,
        shape=shape,
        work=work,
        device=device,
        assumed=assumed,
        memory=memory(shape, work),
        stages=tuple(_stage_times(recipe, shape, work, device, assumed)),
    )

    def hours(load: Workload) -> float:
        return sum(stage.hours for stage in _stage_times(recipe, shape, load, device, assumed))

    checks = (
        *_refusals(recipe, devices),
        *sampler_checks(shape, work, device),
        *memory_checks(shape, work, device),
        *(() if found.fits else _fitting_recipes(found)),
        *time_checks(shape, work, device, found.decoding, hours),
        *_disk_checks(recipe, shape, work),
    )
    return dataclasses.replace(found, checks=checks)


def _stage_times(
    recipe: Recipe, shape: ModelShape, work: Workload, device: Device, assumed: Assumptions
) -> Iterator[StageTime]:
    train = recipe.train
    steps: Counter[tuple[tuple[str, ...], bool]] = Counter()
    for stage in make_stages(train):
        for step in range(stage.start, stage.start + stage.steps):
            steps[tuple(stage.branches(step)), stage.dense] += 1
    for (branches, dense), count in steps.items():
        g, k = train.group_size(branches == ("localization",))
        share = 1.0 if dense else work.kept_share
        load = dataclasses.replace(work, num_localizations=g, num_reasonings=k, kept_share=share)
        yield StageTime(
            name=" and ".join(branches), steps=count, seconds=seconds(shape, load, device, assumed, branches)
        )


def _refusals(recipe: Recipe, devices: int) -> Iterator[Check]:
    """What training would refuse, by the rules of the trainer and of the plan."""
    lora, trainer = recipe.model.lora, recipe.trainer
    recomputed = fsdp_recomputes(trainer.get("fsdp"), trainer.get("fsdp_config"))
    found = [
        *get_plan(recipe.sparsify.plan).recipe_problems(recipe),
        *refusals(
            recipe.train,
            adapters=lora is not None,
            recomputed_dropout=lora.dropout if lora is not None and recomputed else 0.0,
            quantized=recipe.model.quantization is not None,
            sharded=bool(trainer.get("fsdp")),
            processes=devices,
        ),
    ]
    for key, why in found:
        yield Check(key, "missing", "training would refuse this", why)


def _fitting_recipes(found: Diagnosis) -> Iterator[Check]:
    """The shipped recipes for the same model that fit these devices."""
    for name in recipe_names():
        other = load_recipe(name)
        if other.model.path != found.recipe.model.path or other.name == found.recipe.name:
            continue
        work = make_workload(other, found.shape, found.work.devices, "bfloat16", found.device)
        peak = memory(found.shape, work).peak
        if peak <= USABLE * found.device.memory and not list(_refusals(other, found.work.devices)):
            yield Check(
                "recipe", "warn", f"{name} fits: {peak / GIB:.1f} GiB", f"vitos doctor --recipe {name}", required=False
            )


def make_workload(
    recipe: Recipe,
    shape: ModelShape,
    devices: int,
    saved_dtype: str,
    device: Device,
    images: int | None = None,
) -> Workload:
    """The part of a recipe that decides memory and time, on one device.

    Args:
        recipe: the recipe.
        shape: sizes of its model.
        devices: number of devices.
        saved_dtype: number format of the checkpoint, for `model.dtype: auto`; all but float32 count as 16 bits.
        device: kind of the devices.
        images: number of distinct training images, if it is known.
    """
    train, model, trainer = recipe.train, recipe.model, recipe.trainer
    dtype = saved_dtype.removeprefix("torch.") if model.dtype == "auto" else model.dtype
    weight_bytes = 4 if dtype == "float32" else SIXTEEN_BITS
    sharded = bool(trainer.get("fsdp"))
    # PEFT keeps adapters in float32; FSDP's mixed precision makes trained weights float32.
    trained_bytes = 4 if model.lora or (sharded and train.bf16) else weight_bytes
    names = ("activation_checkpointing", "gradient_checkpointing")  # new name and old one of the same argument
    checkpointed = any(trainer.get(n) or dict(trainer.get("fsdp_config") or {}).get(n) for n in names)
    tokens = shape.visual_tokens + TEXT_TOKENS
    questions = max(1, train.questions_per_step // devices)
    guards = train.localization_kl > 0 or train.frozen_boxes
    # There are two kinds of updates; this is the one that samples more.
    groups = max((train.group_size(alone) for alone in (False, True)), key=lambda size: size[0] * (1 + size[1]))
    return Workload(
        localize_tokens=tokens,
        reason_tokens=tokens,
        visual_tokens=shape.visual_tokens,
        max_localization_tokens=train.max_localization_tokens,
        max_reasoning_tokens=train.max_reasoning_tokens,
        questions=questions,
        num_localizations=groups[0],
        num_reasonings=groups[1],
        micro_batch_tokens=train.micro_batch_tokens,
        sampling_tokens=train.sampling_batch_tokens,
        weight_bytes=weight_bytes,
        trained_bytes=trained_bytes,
        state_bytes=state_bytes(str(trainer.get("optim", "adamw_torch_fused")), trained_bytes),
        nf4=model.quantization == "nf4",
        precision=_precision(train.bf16, sharded, weight_bytes),
        rank=model.lora.r if model.lora else None,
        checkpointing=bool(checkpointed),
        devices=devices,
        sharded=sharded,
        references=(train.kl_beta > 0) + guards,
        cosine=train.log_gradient_cosine_steps > 0 or train.schedule == "joint",
        scans=min(images or train.total_steps * train.questions_per_step, train.total_steps * questions),
        vllm=_vllm_share(recipe, shape, device) if train.sampler == "vllm" else None,
    )


def _vllm_share(recipe: Recipe, shape: ModelShape, device: Device) -> VllmShare:
    """The part of a device that the recipe gives to vLLM, which holds the language model in 16 bits."""
    options, train = recipe.train.sampler_options, recipe.train
    shards = int(options.get("tensor_parallel_size", 1))
    reserved = round(float(options.get("gpu_memory_utilization", VLLM_UTILIZATION)) * device.memory)
    cache = shards * (reserved - WORKSPACE) - SIXTEEN_BITS * shape.text_parameters
    return VllmShare(
        reserved=reserved,
        cache=max(0, cache),
        sequences=int(options.get("max_num_seqs", most_sequences(device))),
        sleep=train.sampler_sleep,
        shards=shards,
    )


def _precision(bf16: bool, sharded: bool, weight_bytes: int) -> Precision:
    """Number format of the activations, given `train.bf16`, FSDP and the size of a weight."""
    if bf16:
        return "bfloat16" if sharded else "autocast"
    return "bfloat16" if weight_bytes == SIXTEEN_BITS else "float32"


def _disk_checks(recipe: Recipe, shape: ModelShape, work: Workload) -> Iterator[Check]:
    """Checkpoints and cache against the free disk; the machine's memory while a sharded model is loaded."""
    free = shutil.disk_usage(nearest_folder(Path(recipe.output_dir))).free
    parameters, trained = shape.text_parameters + shape.vision_parameters, trained_parameters(shape, work)
    loaded = parameters * work.weight_bytes
    written = parameters * (work.trained_bytes if work.rank is None else 4)  # adapters are merged in float32
    kept = (recipe.train.save_total_limit or 1) + 1  # and the one that is being written
    size = kept * ((written if work.rank is None else 4 * trained) + round(work.state_bytes * trained))
    size += 2 * written  # stage1 and the final model
    detail = f"{size / GIB:.0f} GiB of checkpoints and models; {free / GIB:.0f} GiB free for {recipe.output_dir}"
    if size < free:
        yield Check("disk", "ok", detail)
    else:
        yield Check("disk", "warn", detail, "set output_dir to a larger disk, or a smaller train.save_total_limit")
    image = work.visual_tokens * shape.hidden * work.weight_bytes
    yield Check(
        "embedding cache",
        "ok",
        f"at most {image / (1 << 20):.1f} MiB per image ({1000 * image / GIB:.1f} GiB for 1,000), streams not counted",
        required=False,
    )
    if work.sharded:
        text = f"{work.devices * loaded / GIB:.0f} GiB of the machine's memory while it is loaded"
        yield Check("loading", "ok", f"{text}: every process reads the whole model first")
    if work.vllm is not None and work.vllm.sleep == 1:
        text = f"{work.devices * SIXTEEN_BITS * shape.text_parameters / work.vllm.shards / GIB:.0f} GiB"
        yield Check("host memory", "ok", f"{text} for the weights of sleeping engines; none at train.sampler_sleep: 2")


def _saved_limit(path: str) -> int | None:
    """Pixel limit in the preprocessor file of a local checkpoint."""
    file = Path(config_folder(path)) / "preprocessor_config.json"
    if not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    limit = dict(saved.get("size") or {}).get("longest_edge") or saved.get("max_pixels")
    return int(limit) if limit else None


def render_diagnosis(found: Diagnosis) -> Group:
    """Tables for the terminal: memory by part and moment, time, checks, and what was assumed."""
    moments = found.memory.moments
    table = Table(title=f"{found.recipe.name}: GiB on each of {found.work.devices} device(s)", title_justify="left")
    table.add_column("part")
    for moment in moments:
        table.add_column(moment, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(f"{parts[part] / GIB:.2f}" if part in parts else "–" for parts in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(parts.values()) / GIB:.2f}" for parts in moments.values()))
    time = Table(title="Seconds of an update, every completion at its full length", title_justify="left")
    time.add_column("part")
    for stage in found.stages:
        time.add_column(f"trains {stage.name}", justify="right")
    for part in found.stages[0].seconds:
        time.add_row(part, *(f"{stage.seconds[part]:.1f}" for stage in found.stages))
    time.add_section()
    time.add_row("sum", *(f"{sum(stage.seconds.values()):.1f}" for stage in found.stages))
    time.add_row("updates", *(str(stage.steps) for stage in found.stages))
    time.add_row("hours", *(f"{stage.hours:.1f}" for stage in found.stages))
    total = f"{sum(stage.steps for stage in found.stages)} updates: {found.hours:.1f} h"
    return Group(table, time, total, checks_table(found.checks), _notes(found))


def _notes(found: Diagnosis) -> str:
    """What the figures rest on."""
    assumed, device, work = found.assumed, found.device, found.work
    torch = f"{assumed.compute:.0%} of {device.flops / 1e12:.0f} TFLOP/s in plain PyTorch"
    if work.vllm is None:
        rollouts = (
            f"{assumed.bandwidth:.0%} of {device.bandwidth / 1e12:.2f} TB/s while decoding, and at least "
            f"{1000 * assumed.launch:g} ms per layer and token"
        )
    else:
        vllm = assumed.vllm
        rollouts = (
            f"vLLM reaches {vllm.prefill:.0%} of the peak in prefill and {vllm.decode * vllm.engine:.0%} of the "
            f"roofline of {device.bandwidth / 1e12:.2f} TB/s while decoding, with at most {work.vllm.sequences} "
            "sequences"
        )
    return (
        f"Assumed: {found.shape.visual_tokens} visual and {TEXT_TOKENS} text tokens per prompt; {torch}; {rollouts}; "
        f"reasoning keeps {work.kept_share:.0%} of the visual tokens (for time; for memory all). Shares: "
        f"{assumed.source}. Encoding, pushing weights, communication, loading and evaluation are not counted. Memory "
        "was checked against measurements of small models on a CPU, vLLM's speed against published runs."
    )
