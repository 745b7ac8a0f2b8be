"""Low-rank adapters (PEFT) on the language model of a policy; needs the `lora` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitos.backbones.quantized import full_state
from vitos.data.files import write_json_atomic
from vitos.policy.vlm import SparseVLM

if TYPE_CHECKING:
    from peft import LoraConfig


def add_adapters(policy: SparseVLM, lora: LoraConfig) -> torch.nn.Module:
    """The policy's model with adapters; "all-linear" excludes the vision encoder and the head."""
    from peft import get_peft_model

    model = policy.backbone.model
    outside = {id(m) for root in policy.backbone.vision_modules for m in root.modules()}
    outside.add(id(model.get_output_embeddings()))
    if lora.target_modules == "all-linear":
        lora.target_modules = [
            name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) not in outside
        ]
    return get_peft_model(model, lora)


def is_adapted(model: Any) -> bool:
    """Whether `model` is a PEFT model with adapters."""
    return hasattr(model, "merge_and_unload")


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of an adapted model with its adapters added, float32, on the CPU; the model stays as it is.

    `W + s·B·A` is made tensor by tensor. In float32, because a step of training is smaller than what bfloat16 weights
    can take: rounding would undo it.
    """
    network = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): value.detach().to(
            "cpu", torch.float32 if value.is_floating_point() else None
        )
        for name, value in full_state(network).items()
        if ".lora_" not in name
    }
    for name, layer in network.named_modules():
        if hasattr(layer, "get_delta_weight"):
            for adapter in layer.active_adapters:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(adapter).to(
                    "cpu", torch.float32
                )
    return weights


def save_adapted(policy: SparseVLM, model: Any, folder: Path) -> None:
    """Write a policy with its adapters merged as an ordinary float32 checkpoint."""
    policy.save_pretrained(folder, merged_weights(model))
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)  # what 4 bits stood for is written in full
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    write_json_atomic(file, settings)
