"""The answers of `vitos doctor --recipe`: whether a recipe fits, how long an update takes, and what would help."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from vitos.config.recipe import Recipe
from vitos.doctor.devices import DEVICES, Device, detected_device
from vitos.doctor.estimate import (
    Assumptions,
    Memory,
    Precision,
    Workload,
    batches,
    memory,
    seconds,
    trained_parameters,
)
from vitos.doctor.machine import GIB, Check, checks_table, nearest_folder
from vitos.doctor.shapes import ModelShape, find_config, model_shape
from vitos.policy.locate import config_folder

TEXT_TOKENS = 400
"""Length of a prompt without its image (chat template, instruction, question): an assumption; measure yours."""
USABLE = 0.92
"""Share of a device's memory that PyTorch can use; fragments and the kernels' workspaces take the rest."""
SIXTEEN_BITS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The estimate of one recipe.

    Attributes:
        recipe: the recipe.
        shape: sizes of its model.
        work: the load of one device.
        device: kind of all devices.
        memory, seconds: what an update takes on one device.
        checks: what fits, what does not, and what to do about it.
    """

    recipe: Recipe
    shape: ModelShape
    work: Workload
    device: Device
    memory: Memory
    seconds: Mapping[str, float]
    checks: tuple[Check, ...]


def diagnose_recipe(
    recipe: Recipe, devices: int | None = None, device: Device | None = None, images: int | None = None
) -> Diagnosis:
    """Estimate a recipe.

    Args:
        recipe: the recipe.
        devices: number of processes, one per device; None: 8 for a sharded recipe, else 1.
        device: kind of the devices; None: the GPU of this machine, or without one an H100 of 80 GB.
        images: number of distinct training images; None: one for each question of all updates.

    Raises:
        ValueError: if the model's sizes are not known (see `find_config`), or the questions of an update cannot be
            shared evenly among the devices.
    """
    config = find_config(recipe.model.path)
    shape = model_shape(config, recipe.model.max_pixels or _saved_limit(recipe.model.path))
    if recipe.model.attn_implementation != "sdpa":  # then the engine gives each sibling a copy of the prompt's keys
        shape = dataclasses.replace(shape, shares_prompt=False)
    devices = devices or (8 if recipe.trainer.get("fsdp") else 1)
    if recipe.train.questions_per_step % devices:
        raise ValueError(
            f"train.questions_per_step ({recipe.train.questions_per_step}) must be a multiple of the {devices} devices"
        )
    work = make_workload(recipe, shape, devices, str(getattr(config, "dtype", None)), images)
    device = device or detected_device() or DEVICES["H100 80GB"]
    time = seconds(shape, work, device)
    return Diagnosis(
        recipe=recipe,
        shape=shape,
        work=work,
        device=device,
        memory=memory(shape, work),
        seconds=time,
        checks=(
            *_memory_checks(shape, work, device),
            *_time_checks(work, time),
            *_disk_checks(recipe, shape, work),
        ),
    )


def make_workload(
    recipe: Recipe, shape: ModelShape, devices: int, saved_dtype: str, images: int | None = None
) -> Workload:
    """The part of a recipe that decides memory and time, on one device.

    Args:
        recipe: the recipe.
        shape: sizes of its model.
        devices: number of devices.
        saved_dtype: number format of the checkpoint, for `model.dtype: auto`; all but float32 count as 16 bits.
        images: number of distinct training images, if it is known.
    """
    train, model, trainer = recipe.train, recipe.model, recipe.trainer
    dtype = saved_dtype.removeprefix("torch.") if model.dtype == "auto" else model.dtype
    weight_bytes = 4 if dtype == "float32" else SIXTEEN_BITS
    sharded = bool(trainer.get("fsdp"))
    names = ("activation_checkpointing", "gradient_checkpointing")  # new name and old one of the same argument
    checkpointed = any(trainer.get(n) or dict(trainer.get("fsdp_config") or {}).get(n) for n in names)
    tokens = shape.visual_tokens + TEXT_TOKENS
    questions = train.questions_per_step // devices
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
        weight_bytes=weight_bytes,
        precision=_precision(train.bf16, sharded, weight_bytes),
        rank=model.lora.r if model.lora else None,
        checkpointing=bool(checkpointed),
        devices=devices,
        sharded=sharded,
        references=(train.kl_beta > 0) + guards,
        cosine=train.log_gradient_cosine_steps > 0 or train.schedule == "joint",
        scans=min(images or train.total_steps * train.questions_per_step, train.total_steps * questions),
    )


def _precision(bf16: bool, sharded: bool, weight_bytes: int) -> Precision:
    """Number format of the activations, given `train.bf16`, FSDP and the size of a weight."""
    if bf16:
        return "bfloat16" if sharded else "autocast"
    return "bfloat16" if weight_bytes == SIXTEEN_BITS else "float32"


def remedies(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Changes of a recipe that can save memory, as (text, workload after the change)."""
    change = dataclasses.replace
    if not work.checkpointing:
        yield "trainer: {gradient_checkpointing: true}", change(work, checkpointing=True)
    if work.rank is None and not work.sharded:
        adapted = change(work, rank=64, weight_bytes=SIXTEEN_BITS, precision="autocast")
        yield "model.lora: {r: 64} with model.dtype: bfloat16", adapted
        if not work.checkpointing:
            both = change(adapted, checkpointing=True)
            yield "both, adapters and trainer: {gradient_checkpointing: true}", both
    if work.devices > 1 and not work.sharded and work.rank is None:
        yield "trainer: {fsdp: true, fsdp_config: {version: 2, …}}", change(work, sharded=True)
    if work.micro_batch_tokens > _least(work):
        yield _smallest(work, "")
    if work.num_localizations > 2 or work.num_reasonings > 2:
        g, k = min(work.num_localizations, 2), min(work.num_reasonings, 2)
        fewer = change(work, num_localizations=g, num_reasonings=k)
        yield _smallest(fewer, f"train.num_localizations: {g}, train.num_reasonings: {k}, ")
    for limit in (1280, 640, 320):
        if (less := work.visual_tokens - limit) > 0:
            prompts = {"localize_tokens": work.localize_tokens - less, "reason_tokens": work.reason_tokens - less}
            smaller = change(work, visual_tokens=limit, **prompts)
            yield _smallest(smaller, f"model.max_pixels for {limit} visual tokens, ")


def _smallest(work: Workload, text: str) -> tuple[str, Workload]:
    """The same with micro-batches of one prompt and its siblings."""
    least = _least(work)
    return f"{text}train.micro_batch_tokens: {least}", dataclasses.replace(work, micro_batch_tokens=least)


def _least(work: Workload) -> int:
    """Least number of tokens that the engine runs at once: one prompt's siblings, in the larger branch."""
    return max(batch.unshared_tokens for batch, _ in batches(work).values())


def _memory_checks(shape: ModelShape, work: Workload, device: Device) -> Iterator[Check]:
    peak, room = memory(shape, work).peak, USABLE * device.memory
    detail = f"{peak / GIB:.1f} GiB of {device.memory / GIB:.1f} on each of {work.devices} x {device.name}"
    if peak <= room:
        yield Check("memory", "ok", detail)
    else:
        after = sorted(((memory(shape, changed).peak, text) for text, changed in remedies(work)))
        better = [
            f"{text} ({size / GIB:.1f} GiB{', fits' if size <= room else ''})" for size, text in after if size < peak
        ]
        remedy = "; ".join(better[:4]) if better else "larger devices"
        if better and after[0][0] > room:
            remedy += "; none is enough alone: combine them, or take larger devices"
        yield Check("memory", "missing", detail, remedy)
    if shape.visual_tokens > 4096:
        yield Check(
            "image size",
            "warn",
            f"{shape.visual_tokens} visual tokens for the largest image within the pixel limits",
            "set model.max_pixels, such as 1003520 (1,280 tokens of 28 x 28 pixels)",
        )


def _time_checks(work: Workload, time: Mapping[str, float]) -> Iterator[Check]:
    decoding, total = sum(value for part, value in time.items() if part.startswith("decode")), sum(time.values())
    count = sum(number for _, number in batches(work).values())
    if decoding > 0.8 * total and count > 2:
        yield Check(
            "time",
            "warn",
            f"{decoding / total:.0%} of an update is decoding, in {count} batches one after the other",
            "raise train.micro_batch_tokens as far as memory allows: a batch of twice the size takes hardly longer",
        )


def _disk_checks(recipe: Recipe, shape: ModelShape, work: Workload) -> Iterator[Check]:
    """Checkpoints and cache against the free disk; the machine's memory while a sharded model is loaded."""
    free = shutil.disk_usage(nearest_folder(Path(recipe.output_dir))).free
    whole = (shape.text_parameters + shape.vision_parameters) * work.weight_bytes
    trained = trained_parameters(shape, work)
    kept = (recipe.train.save_total_limit or 1) + 1  # and the one that is being written
    size = kept * ((whole if work.rank is None else 4 * trained) + 8 * trained)
    size += 2 * whole  # stage1 and the final model
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
        text = f"{work.devices * whole / GIB:.0f} GiB of the machine's memory while it is loaded"
        yield Check("loading", "ok", f"{text}: every process reads the whole model first")


def _saved_limit(path: str) -> int | None:
    """Pixel limit in the preprocessor file of a local checkpoint."""
    file = Path(config_folder(path)) / "preprocessor_config.json"
    if not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    limit = dict(saved.get("size") or {}).get("longest_edge") or saved.get("max_pixels")
    return int(limit) if limit else None


def render_diagnosis(found: Diagnosis, assumed: Assumptions = Assumptions()) -> Group:
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
    time.add_column("seconds", justify="right")
    for part, value in found.seconds.items():
        time.add_row(part, f"{value:.1f}")
    time.add_section()
    total, updates = sum(found.seconds.values()), found.recipe.train.total_steps
    time.add_row(f"sum ({updates} updates: {total * updates / 3600:.1f} h)", f"{total:.1f}")
    notes = (
        f"Assumed: {found.shape.visual_tokens} visual and {TEXT_TOKENS} text tokens per prompt; {assumed.compute:.0%} "
        f"of {found.device.flops / 1e12:.0f} TFLOP/s; {assumed.bandwidth:.0%} of {found.device.bandwidth / 1e12:.2f} "
        f"TB/s while decoding, and at least {1000 * assumed.launch:g} ms per layer and token; reasoning keeps "
        f"{found.work.kept_share:.0%} of the visual tokens (for time; for memory all). Encoding, communication and "
        "loading are not counted. Memory was checked against measurements of small models on a CPU; time was not "
        "checked."
    )
    return Group(table, time, checks_table(found.checks), notes)
