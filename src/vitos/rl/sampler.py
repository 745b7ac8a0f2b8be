"""The engine that writes the rollouts of a training run, where it is not the trained model itself."""

from __future__ import annotations

import torch

from vitos.backbones.base import Backbone
from vitos.engines.vllm.engine import VllmEngine
from vitos.engines.vllm.sampler import VllmSampler
from vitos.rl.adapters import is_adapted
from vitos.rl.config import DualStreamConfig


def vllm_engine(backbone: Backbone, network: torch.nn.Module, args: DualStreamConfig) -> VllmEngine:
    """vLLM in this process, in the number format of the training.

    Raises:
        ValueError: for adapters, and for several processes: their weights would have to be merged or gathered first.
    """
    if is_adapted(network):
        raise ValueError("train.sampler: vllm takes no adapters yet; leave out model.lora, or sample with torch")
    if args.world_size > 1:
        raise ValueError(
            f"train.sampler: vllm runs in one training process, but there are {args.world_size}; sample with torch"
        )
    dtype = torch.bfloat16 if args.bf16 else backbone.model.dtype
    sampler = VllmSampler(backbone, str(dtype).removeprefix("torch."), **args.sampler_options)
    return VllmEngine(backbone, sampler, tolerance=1e-3 if dtype == torch.float32 else 0.1)
