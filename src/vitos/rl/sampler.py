"""The engine that writes the rollouts of a training run, where it is not the trained model itself."""

from __future__ import annotations

import torch

from vitos.backbones.base import Backbone
from vitos.engines.vllm.engine import VllmEngine
from vitos.engines.vllm.sampler import VllmSampler
from vitos.rl.config import DualStreamConfig


def vllm_engine(backbone: Backbone, args: DualStreamConfig) -> VllmEngine:
    """vLLM in this process, in the number format of the training; `combinations.py` has what it does not go with."""
    dtype = torch.bfloat16 if args.bf16 else backbone.model.dtype
    name = str(dtype).removeprefix("torch.")
    sampler = VllmSampler(backbone, name, sleep_level=args.sampler_sleep, **args.sampler_options)
    return VllmEngine(backbone, sampler, tolerance=1e-3 if dtype == torch.float32 else 0.1)
