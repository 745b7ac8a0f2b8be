"""What `vitos doctor --recipe` says: will a recipe fit, how long does an update take, and what to change if not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from vitos.config.recipe import Recipe
from vitos.doctor.devices import DEVICES, Device, detected_device
from vitos.doctor.estimate import Assumptions, Job, Memory, Seconds, batches, memory, seconds
from vitos.doctor.machine import GIB, Finding, render
from vitos.doctor.shapes import ModelShape, find_config, model_shape
from vitos.policy.locate import config_folder

TEXT_TOKENS = 400  # of a prompt besides its image: chat template, instruction, question; measure yours
SPARE = 0.92  # of a device's memory that PyTorch can use before fragments and kernels' workspaces fill it


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The estimate of one recipe on `devices` devices of a kind."""

    recipe: Recipe
    shape: ModelShape
    job: Job
    device: Device
    memory: Memory
    seconds: Seconds
    findings: tuple[Finding, ...]


def diagnose_recipe(
    recipe: Recipe, devices: int | None = None, device: Device | None = None, images: int | None = None
) -> Diagnosis:
    """Estimate a recipe.

    Args:
        devices: processes of the run, one a device; None: 8 for a sharded recipe, else 1.
        device: None: the GPU that is here, without any an H100 of 80 GB.
        images: distinct training images; None: as many as there are questions in all updates.

    Raises:
        ValueError: if the model's sizes are not known (see `find_config`), or the questions of an update cannot be
            shared among the devices.
    """
    config = find_config(recipe.model.path)
    shape = model_shape(config, recipe.model.max_pixels or _saved_limit(recipe.model.path))
    devices = devices or (8 if recipe.trainer.get("fsdp") else 1)
    if recipe.train.questions_per_step % devices:
        raise ValueError(
            f"train.questions_per_step ({recipe.train.questions_per_step}) must be a multiple of the {devices} devices"
        )
    job = make_job(recipe, shape, devices, str(getattr(config, "dtype", None)), images)
    device = device or detected_device() or DEVICES["H100 80GB"]
    found, time = memory(shape, job), seconds(shape, job, device)
    findings = (*_memory_findings(shape, job, device), *_time_findings(job, time), *_disk_findings(recipe, shape, job))
    return Diagnosis(recipe, shape, job, device, found, time, findings)


def make_job(recipe: Recipe, shape: ModelShape, devices: int, saved_dtype: str, images: int | None = None) -> Job:
    """The part of a recipe that decides memory and time, on one device.

    Args:
        saved_dtype: of the checkpoint, for `model.dtype: auto`; anything but float32 counts as 16 bit.
    """
    train, model, trainer = recipe.train, recipe.model, recipe.trainer
    dtype = saved_dtype.removeprefix("torch.") if model.dtype == "auto" else model.dtype
    weight_bytes = 4 if dtype == "float32" else 2
    sharded = bool(trainer.get("fsdp"))
    names = ("activation_checkpointing", "gradient_checkpointing")  # new name and old one of the same argument
    checkpointed = any(trainer.get(n) or dict(trainer.get("fsdp_config") or {}).get(n) for n in names)
    tokens = shape.visual_tokens + TEXT_TOKENS
    questions = train.questions_per_step // devices
    guards = train.localization_kl > 0 or train.frozen_boxes
    # Of both kinds of updates the one that samples more.
    groups = max((train.group_size(alone) for alone in (False, True)), key=lambda size: size[0] * (1 + size[1]))
    return Job(
        localize_tokens=tokens,
        reason_tokens=tokens,
        visual_tokens=shape.visual_tokens,
        max_localization_tokens=train.max_localization_tokens,
        max_reasoning_tokens=train.max_reasoning_tokens,
        questions=questions,
        num_localizations=groups[0],
        num_reasonings=groups[1],
        micro_batch_tokens=train.micro_batch_tokens,
        weight_bytes=weight_bytes,
        precision=("bfloat16" if sharded else "autocast")
        if train.bf16
        else "float32"
        if weight_bytes == 4
        else "bfloat16",
        rank=model.lora.r if model.lora else None,
        checkpointing=bool(checkpointed),
        devices=devices,
        sharded=sharded,
        references=(train.kl_beta > 0) + guards,
        cosine=train.log_gradient_cosine_steps > 0 or train.schedule == "joint",
        scans=min(images or train.total_steps * train.questions_per_step, train.total_steps * questions),
    )


def remedies(shape: ModelShape, job: Job) -> Iterator[tuple[str, Job]]:
    """Changes of a recipe that can save memory."""
    if not job.checkpointing:
        yield "trainer: {gradient_checkpointing: true}", dataclasses.replace(job, checkpointing=True)
    if job.rank is None and not job.sharded:
        adapted = dataclasses.replace(job, rank=64, weight_bytes=2, precision="autocast")
        yield "model.lora: {r: 64} with model.dtype: bfloat16", adapted
        if not job.checkpointing:
            both = dataclasses.replace(adapted, checkpointing=True)
            yield "both, adapters and trainer: {gradient_checkpointing: true}", both
    if job.devices > 1 and not job.sharded and job.rank is None:
        yield "trainer: {fsdp: true, fsdp_config: {version: 2, …}}", dataclasses.replace(job, sharded=True)
    if job.micro_batch_tokens > _least(job):
        yield _smallest(job, "")
    if job.num_localizations > 2 or job.num_reasonings > 2:
        few = min(job.num_localizations, 2), min(job.num_reasonings, 2)
        changed = dataclasses.replace(job, num_localizations=few[0], num_reasonings=few[1])
        yield _smallest(changed, f"train.num_localizations: {few[0]}, train.num_reasonings: {few[1]}, ")
    for limit in (1280, 640, 320):
        if job.visual_tokens > limit:
            less = job.visual_tokens - limit
            changed = dataclasses.replace(
                job,
                visual_tokens=limit,
                localize_tokens=job.localize_tokens - less,
                reason_tokens=job.reason_tokens - less,
            )
            yield _smallest(changed, f"model.max_pixels for {limit} visual tokens, ")


def _smallest(job: Job, text: str) -> tuple[str, Job]:
    """With micro-batches of one prompt and its siblings."""
    least = _least(job)
    return f"{text}train.micro_batch_tokens: {least}", dataclasses.replace(job, micro_batch_tokens=least)


def _least(job: Job) -> int:
    """Tokens of the larger branch's siblings, each with its prompt: what the engine runs at once at the least."""
    return max(batch.siblings * (batch.prompt + batch.longest) for batch, _ in batches(job).values())


def _memory_findings(shape: ModelShape, job: Job, device: Device) -> Iterator[Finding]:
    peak, room = memory(shape, job).peak, SPARE * device.memory
    detail = f"{peak / GIB:.1f} GiB of {device.memory / GIB:.1f} on each of {job.devices} x {device.name}"
    if peak <= room:
        yield Finding("memory", "ok", detail)
    else:
        after = sorted(((memory(shape, changed).peak, text) for text, changed in remedies(shape, job)))
        better = [
            f"{text} ({size / GIB:.1f} GiB{', fits' if size <= room else ''})" for size, text in after if size < peak
        ]
        remedy = "; ".join(better[:4]) if better else "larger devices"
        if better and after[0][0] > room:
            remedy += "; none is enough alone: combine them, or take larger devices"
        yield Finding("memory", "missing", detail, remedy)
    if shape.visual_tokens > 4096:
        yield Finding(
            "image size",
            "warn",
            f"{shape.visual_tokens} visual tokens for the largest image that the limits let through",
            "set model.max_pixels, such as 1003520 (1,280 tokens of 28 x 28 pixels)",
        )


def _time_findings(job: Job, time: Seconds) -> Iterator[Finding]:
    decoding = sum(value for part, value in time.parts.items() if part.startswith("decode"))
    count = sum(number for _, number in batches(job).values())
    if decoding > 0.8 * time.total and count > 2:
        yield Finding(
            "time",
            "warn",
            f"{decoding / time.total:.0%} of an update is decoding, {count} batches of siblings one after the other",
            "raise train.micro_batch_tokens as far as memory allows: a batch of twice the size takes hardly longer",
        )


def _disk_findings(recipe: Recipe, shape: ModelShape, job: Job) -> Iterator[Finding]:
    """Checkpoints and cache against the free disk; the machine's memory while a sharded model is loaded."""
    folder = next(
        p for p in (Path(recipe.output_dir).absolute(), *Path(recipe.output_dir).absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(folder).free
    whole = shape.text_parameters + shape.vision_parameters
    trained = shape.text_parameters if job.rank is None else job.rank * shape.adapted_widths
    kept = (recipe.train.save_total_limit or 1) + 1  # and the one being written
    size = kept * ((whole * job.weight_bytes if job.rank is None else 4 * trained) + 8 * trained)
    size += 2 * whole * job.weight_bytes  # stage1 and the final model
    detail = f"{size / GIB:.0f} GiB of checkpoints and models; {free / GIB:.0f} GiB free for {recipe.output_dir}"
    remedy = "set output_dir to a larger disk, or a smaller train.save_total_limit"
    yield Finding("disk", "ok" if size < free else "warn", detail, "" if size < free else remedy)
    image = job.visual_tokens * shape.hidden * job.weight_bytes
    yield Finding(
        "embedding cache",
        "ok",
        f"at most {image / (1 << 20):.1f} MiB an image ({1000 * image / GIB:.1f} GiB for 1,000), streams not counted",
        required=False,
    )
    if job.sharded:
        text = f"{job.devices * whole * job.weight_bytes / GIB:.0f} GiB of the machine's memory while it is loaded"
        yield Finding("loading", "ok", f"{text}: every process reads the whole model first")


def _saved_limit(path: str) -> int | None:
    """The pixel limit that stands beside a local checkpoint."""
    file = Path(config_folder(path)) / "preprocessor_config.json"
    if not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    limit = dict(saved.get("size") or {}).get("longest_edge") or saved.get("max_pixels")
    return int(limit) if limit else None


def render_diagnosis(found: Diagnosis, assumed: Assumptions = Assumptions()) -> Group:
    """Tables for the terminal: memory by part and moment, time, findings, and what was assumed."""
    moments = found.memory.moments
    table = Table(title=f"{found.recipe.name}: GiB on each of {found.job.devices} device(s)", title_justify="left")
    table.add_column("part")
    for moment in moments:
        table.add_column(moment, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(f"{parts[part] / GIB:.2f}" if part in parts else "–" for parts in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(parts.values()) / GIB:.2f}" for parts in moments.values()))
    time = Table(title="Seconds of an update, every completion at its full length", title_justify="left")
    time.add_column("part")
    time.add_column("seconds", justify="right")
    for part, value in found.seconds.parts.items():
        time.add_row(part, f"{value:.1f}")
    time.add_section()
    hours = found.seconds.total * found.recipe.train.total_steps / 3600
    time.add_row(f"sum ({found.recipe.train.total_steps} updates: {hours:.1f} h)", f"{found.seconds.total:.1f}")
    notes = (
        f"Assumed: {found.shape.visual_tokens} visual and {TEXT_TOKENS} text tokens a prompt; {assumed.compute:.0%} "
        f"of {found.device.flops / 1e12:.0f} TFLOP/s; {assumed.bandwidth:.0%} of {found.device.bandwidth / 1e12:.2f} "
        f"TB/s while decoding, and at least {1000 * assumed.launch:g} ms a layer and token; reasoning keeps "
        f"{found.job.kept_share:.0%} of the visual tokens (for time; for memory all). Encoding, communication and "
        "loading are not counted. Memory was checked on small models on a CPU only, time was not."
    )
    return Group(table, time, render(found.findings), notes)
