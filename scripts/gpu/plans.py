"""(c) Each plan against one dense pass of the same engine: vision, prefill, decode and the whole, batch 1 and 8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from benchmarks.inference import Settings, device_name, measure_cases, with_told_head
from benchmarks.inference_models import build_model
from scripts.gpu import Setting

TRUE = Settings(
    model="Qwen2.5-VL-3B-Instruct",
    parts=1,
    dtype="bfloat16",
    sizes=(1024,),
    kept=(0.25, 0.1),
    batches=(1, 8),
    runs=2,
    evidence_tokens=8,
    reasoning_tokens=24,
)
TINY = replace(
    TRUE, model="nano", dtype="float32", plans=("two_pass",), sizes=(128,), kept=(0.25,), batches=(1,),
    evidence_tokens=2,
    reasoning_tokens=2, runs=1,
)  # fmt: skip


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row per share kept and batch."""
    settings = replace(TINY if setting.tiny else TRUE, device=str(setting.device))
    backbone, said = build_model(settings.model, settings.parts, getattr(torch, settings.dtype), setting.device)
    spec = with_told_head(backbone, settings.early)
    for case in measure_cases(backbone, spec, settings):
        plans = {name: case[name] for name in settings.names}
        faster = ", ".join(f"{name} {plans[name]['total_ratio'][0]:.2f}" for name in settings.names[1:])
        yield {
            "case": f"{case['size']} px, {case['kept']:.0%} kept, batch {case['batch']}",
            "device": device_name(setting.device),
            "ok": None,
            "said": said,
            "tokens": case["tokens"],
            "plans": plans,
            "summary": f"whole time, dense = 1: {faster}",
        }
