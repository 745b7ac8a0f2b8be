"""Time of one update of a recipe, by arithmetic: pure functions, no torch.

Operations and bytes are counted, and divided by shares of the device's peaks that are assumed (`Assumptions`). Every
completion is taken at its full length. Rollouts by vLLM: `vllm_speed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitos.doctor.devices import Device
from vitos.doctor.estimate import NF4_BYTES, SiblingBatch, Workload, batches, kv_entry_bytes
from vitos.doctor.shapes import ModelShape
from vitos.doctor.vllm_speed import Rollouts, VllmAssumptions, rollout_seconds


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the peaks that are reached; docs/hours.md names the sources. Replace them by a measurement of yours.

    Attributes:
        compute: share of `Device.flops` in plain PyTorch, in prefill and update.
        bandwidth: share of `Device.bandwidth` while plain PyTorch decodes.
        launch: least number of seconds that a layer takes per decoded token in plain PyTorch, whatever its size.
        vllm: what is assumed of vLLM.
        source: where the figures are from, for the notes.
    """

    compute: float = 0.35
    bandwidth: float = 0.6
    launch: float = 1e-3
    vllm: VllmAssumptions = field(default_factory=VllmAssumptions)
    source: str = "assumed; docs/hours.md names the sources"


def measured_assumptions(path: Path) -> Assumptions:
    """Shares that `scripts/gpu_check.py` measured; what it does not measure stays assumed.

    Args:
        path: its `results.json`.

    Raises:
        ValueError: if the file holds no measured update.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = results.get("parts", {}).get("updates", {}).get("rows", [])
    found = [row["assumptions"] for row in rows if row.get("assumptions")]
    if not found:
        raise ValueError(f"{path}: holds no measured update; run scripts/gpu_check.py --part updates on a GPU")
    compute, launch = (sum(float(row[name]) for row in found) / len(found) for name in ("compute", "launch"))
    about = results["machine"]
    source = f"compute and launch measured on {about['device']}, {about['date']} ({path.name}), the others assumed"
    return Assumptions(compute=compute, launch=launch, source=source)


def forward_flops(shape: ModelShape, rows: int, tokens: int, scored: int) -> float:
    """Number of operations in one forward pass: 2 per weight and token, plus attention over all pairs of tokens.

    A block mask saves no attention, because its kernels multiply hidden pairs too.

    Args:
        rows: number of rows.
        tokens: length of a row.
        scored: number of tokens whose logits are computed, in all rows together.
    """
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return rows * (2.0 * shape.active_parameters * tokens + attention) + 2.0 * shape.hidden * shape.vocab * scored


def seconds(
    shape: ModelShape,
    work: Workload,
    device: Device,
    assumed: Assumptions = Assumptions(),
    trained: Collection[str] | None = None,
) -> dict[str, float]:
    """Seconds by part of one update that samples both branches.

    Args:
        trained: names of the trained branches, "localization" and "reasoning"; None: the more expensive one.
    """
    parts: dict[str, float] = {}
    updates: dict[str, float] = {}
    dropped = round(work.visual_tokens * (1 - work.kept_share))
    passes = 3.0 if work.rank is None else 2.0  # without gradients of weights, the backward pass is half as long
    sampled = batches(work, work.sampling_tokens)
    for name, (largest, count) in batches(work).items():
        cut = dropped if name == "reasoning" else 0
        prompts = work.questions * (work.num_localizations if name == "reasoning" else 1)
        if work.vllm is None:
            rollout = _torch_seconds(shape, work, device, assumed, *sampled[name], cut)
        else:
            share = work.vllm
            load = Rollouts(  # devices that share an engine share its questions
                prompts=prompts * share.shards,
                prompt=largest.prompt - cut,
                siblings=largest.siblings,
                longest=largest.longest,
            )
            rollout = rollout_seconds(shape, device, load, share.cache, share.sequences, assumed.vllm, share.shards)
        parts |= {f"{part}, {name}": value for part, value in rollout.items()}
        batch = replace(largest, prompt=largest.prompt - cut)
        forward = count * forward_flops(
            shape, batch.rows, batch.row_tokens, batch.rows * batch.siblings * batch.longest
        )
        updates[name] = (passes + work.checkpointing) * forward / (assumed.compute * device.flops)
    update = max(updates.values()) if trained is None else sum(updates[name] for name in trained)
    return parts | {"update": update}


def _torch_seconds(
    shape: ModelShape,
    work: Workload,
    device: Device,
    assumed: Assumptions,
    largest: SiblingBatch,
    count: int,
    cut: int,
) -> dict[str, float]:
    """Seconds of one branch's rollouts in the torch engine, batch after batch.

    Args:
        largest: the largest batch.
        count: number of batches.
        cut: number of tokens by which the prompts are shorter than in the worst case.
    """
    batch = replace(largest, prompt=largest.prompt - cut)
    prefill = count * forward_flops(shape, batch.rows, batch.prompt, batch.rows)
    cached = batch.prompt * (1 if shape.shares_prompt else batch.siblings) + batch.siblings * batch.longest / 2
    weights = shape.active_parameters * work.value_bytes + (shape.linear_parameters * NF4_BYTES if work.nf4 else 0)
    read = weights + batch.rows * shape.layers * kv_entry_bytes(shape, work) * cached
    products = 2.0 * (shape.active_parameters + shape.hidden * shape.vocab) * batch.rows * batch.siblings
    token = max(
        read / (assumed.bandwidth * device.bandwidth),
        products / (assumed.compute * device.flops),
        shape.layers * assumed.launch,
    )
    return {"prefill": prefill / (assumed.compute * device.flops), "decode": count * batch.longest * token}
