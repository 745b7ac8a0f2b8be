"""What fits, what does not, and which single changes of a recipe would help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from vitos.doctor.devices import Device
from vitos.doctor.estimate import Workload, batches, memory
from vitos.doctor.machine import GIB, Check
from vitos.doctor.shapes import ModelShape
from vitos.doctor.vllm_speed import SIXTEEN_BITS, WORKSPACE, kv_bytes

USABLE = 0.92
"""Share of a device's memory that PyTorch can use; fragments and the kernels' workspaces take the rest."""


def remedies(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Changes of a recipe that can save memory, as (text, workload after the change)."""
    change = dataclasses.replace
    if work.vllm is not None and work.vllm.sleep == 0:
        yield "train.sampler_sleep: 2", change(work, vllm=change(work.vllm, sleep=2))
    if not work.checkpointing:
        yield "trainer: {gradient_checkpointing: true}", change(work, checkpointing=True)
    yield from _adapters(work)
    if work.devices > 1 and not work.sharded and work.rank is None:
        yield "trainer: {fsdp: true, fsdp_config: {version: 2, …}}", change(work, sharded=True)
    if max(work.micro_batch_tokens, work.sampling_tokens or 0) > _least(work):
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


def _adapters(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Low-rank adapters on 16-bit weights, and on 4-bit ones."""
    change = dataclasses.replace
    if work.rank is None and not work.sharded:
        adapted = change(
            work, rank=64, weight_bytes=SIXTEEN_BITS, trained_bytes=4, state_bytes=8.0, precision="autocast"
        )
        yield "model.lora: {r: 64} with model.dtype: bfloat16", adapted
        if not work.checkpointing:
            both = change(adapted, checkpointing=True)
            yield "both, adapters and trainer: {gradient_checkpointing: true}", both
    elif work.rank is not None and not work.nf4 and work.vllm is None:
        yield "model.quantization: nf4", change(work, nf4=True)


def _smallest(work: Workload, text: str) -> tuple[str, Workload]:
    """The same with micro-batches of one prompt and its siblings."""
    least = _least(work)
    change = dataclasses.replace(work, micro_batch_tokens=least, sampling_tokens=None)
    return f"{text}train.micro_batch_tokens: {least}", change


def _least(work: Workload) -> int:
    """Least number of tokens that the engine runs at once: one prompt's siblings, in the larger branch."""
    return max(batch.unshared_tokens for batch, _ in batches(work).values())


def memory_checks(shape: ModelShape, work: Workload, device: Device) -> Iterator[Check]:
    """Whether the peak fits, and what makes it smaller; the size of the largest image."""
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


def sampler_checks(shape: ModelShape, work: Workload, device: Device) -> Iterator[Check]:
    """Whether vLLM's share of the device holds its weights and enough sequences, beside what training keeps."""
    if work.vllm is None:
        return
    share = work.vllm
    longest = max(work.localize_tokens + work.max_localization_tokens, work.reason_tokens + work.max_reasoning_tokens)
    held = share.cache // (longest * kv_bytes(shape))
    least = (SIXTEEN_BITS * shape.text_parameters + longest * kv_bytes(shape)) / share.shards + WORKSPACE
    kept = memory(shape, work).sampling
    free = USABLE * device.memory - (sum(kept.values()) - kept["vLLM"])
    detail = f"{share.reserved / GIB:.1f} GiB; its cache holds {held} sequences of {longest} tokens"
    if share.reserved >= least and share.reserved <= free:
        yield Check("vLLM", "ok", detail)
        return
    if free < least:
        remedy = (
            f"it needs {least / GIB:.1f} GiB, and training leaves {max(0.0, free) / GIB:.1f}: train.sampler: torch"
        )
    else:
        share_of = [least / device.memory, free / device.memory]
        remedy = f"train.sampler_options.gpu_memory_utilization between {share_of[0]:.2f} and {share_of[1]:.2f}"
    yield Check("vLLM", "missing", detail, remedy)


def time_checks(
    shape: ModelShape, work: Workload, device: Device, decoding: float, hours: Callable[[Workload], float]
) -> Iterator[Check]:
    """What would make the torch engine's decoding shorter.

    Args:
        decoding: share of the time that is decoding.
        hours: hours of the run with another workload.
    """
    if work.vllm is not None or decoding <= 0.8:
        return
    best, tokens = work, work.sampling_tokens or work.micro_batch_tokens
    while sum(count for _, count in batches(work, tokens).values()) > 2:
        tokens *= 2
        changed = dataclasses.replace(work, sampling_tokens=tokens)
        if sum(memory(shape, changed).sampling.values()) > USABLE * device.memory:
            break
        best = changed
    if best is not work:
        remedy = f"train.sampling_batch_tokens: {best.sampling_tokens} ({hours(best):.1f} h), or train.sampler: vllm"
        yield Check("time", "warn", f"{decoding:.0%} of an update is decoding", remedy)
