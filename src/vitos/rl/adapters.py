"""Low-rank adapters (PEFT) on the language model of a policy; needs the `lora` extra."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from vitos.backbones.quantized import quantizer_set_aside
from vitos.data.files import write_json_atomic
from vitos.engines.weights import check_adapters, effective_weights, plain_names
from vitos.policy.vlm import SparseVLM

if TYPE_CHECKING:
    from peft import LoraConfig


def add_adapters(policy: SparseVLM, lora: LoraConfig) -> torch.nn.Module:
    """The policy's model with adapters; "all-linear" excludes the vision encoder and the head.

    Raises:
        ValueError: for adapters that cannot be added to the weights; see `vitos.engines.weights.check_adapters`.
    """
    from peft import get_peft_model

    model = policy.backbone.model
    outside = {id(m) for root in policy.backbone.vision_modules for m in root.modules()}
    outside.add(id(model.get_output_embeddings()))
    if lora.target_modules == "all-linear":
        lora.target_modules = [
            name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) not in outside
        ]
    adapted = get_peft_model(model, lora)
    for module in policy.backbone.vision_modules:
        module.requires_grad_(False)  # PEFT unfreezes all biases with `bias="all"`
    check_adapters(model)
    return adapted


def is_adapted(model: Any) -> bool:
    """Whether `model` is a PEFT model with adapters."""
    return hasattr(model, "merge_and_unload")


def load_sharded_adapters(model: Any, folder: Path) -> None:
    """Load the adapters of a checkpoint into a sharded model; PEFT's own loading takes whole tensors only.

    Raises:
        ValueError: if the file holds other tensors than the model has.
    """
    from peft import get_peft_model_state_dict

    with plain_names(model):
        own = model.state_dict()
        adapters = get_peft_model_state_dict(model, state_dict=own)
    names = {id(value): name for name, value in own.items()}
    places = {given: names[id(value)] for given, value in adapters.items()}
    stored = load_file(folder / "adapter_model.safetensors")
    if different := sorted(stored.keys() ^ places.keys()):
        raise ValueError(f"{folder} holds adapters of another shape than model.lora: {', '.join(different[:3])} …")
    full: dict[str, Any] = {places[given]: value for given, value in stored.items()}
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, strict=False))


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of an adapted model with its adapters added, float32, on the CPU; the model stays as it is.

    In float32, because a step of training is smaller than what bfloat16 weights can take: rounding would undo it.
    Processes that hold shards call it together.
    """
    network = model.get_base_model()
    with plain_names(network):
        stored = network.state_dict()
        buffers = {name: stored[name] for name, _ in network.named_buffers() if name in stored}
    weights = {name: _stored(make()) for name, make in effective_weights(network).items()}
    return weights | {name: _stored(value) for name, value in buffers.items()}


def _stored(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)


def save_adapted(policy: SparseVLM, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a policy with the `merged_weights` of its model as an ordinary float32 checkpoint."""
    with quantizer_set_aside(policy.backbone.model):
        policy.save_pretrained(folder, weights)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)  # what 4 bits stood for is written in full
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    write_json_atomic(file, settings)


def load_adapters(model: Any, folder: Path) -> None:
    """Go on with the adapters that a PEFT model wrote into `folder`, instead of fresh ones."""
    (name,) = model.active_adapters
    model.load_adapter(folder, name, is_trainable=True)
