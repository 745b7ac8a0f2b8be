"""The weights that a model computes with, one tensor at a time: adapters added, shards gathered.

What is pushed into a sampler and what is saved must be the policy that is trained. It is made here from the trained
parts, `W + s·B·A` tensor by tensor, and nothing is written into the model: adding adapters to the weights in place and
taking them out again would change the weights by rounding, more with each update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor

from vitos.backbones.quantized import full_weight, is_packed

WeightMaker = Callable[[], Tensor]

_LAYERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.layer", "Embedding"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
)
"""Modules and names of PEFT's classes whose change of the weight is added here."""


def whole(tensor: Tensor) -> Tensor:
    """A tensor without gradient, its shards gathered; all processes that hold shards must call it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def plain_names(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the modules of `model` have the names that they have without accelerate's activation checkpointing.

    It wraps each layer, which gives all modules in it longer names. PEFT then finds no adapters, and saves none.
    """
    wrapped = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if isinstance(module, CheckpointWrapper)
    ]
    for parent, name, module in wrapped:
        setattr(parent, name, module._checkpoint_wrapped_module)
    try:
        yield
    finally:
        for parent, name, module in wrapped:
            setattr(parent, name, module)


def effective_weights(model: Any) -> dict[str, WeightMaker]:
    """The weights that `model` computes with, by the names of the model without adapters.

    Each entry is a function that makes the tensor when it is called, so that no second whole model is ever held.
    Processes that hold shards must call the functions in the same order. Tied weights are listed once; buffers are
    not listed. An adapted weight is float32, and so is what a weight in 4 bits stands for; all others have their own
    number format.

    Args:
        model: a model, with or without PEFT adapters in its layers, whole or sharded (FSDP2).

    Raises:
        ValueError: for adapters that are no change of a weight, or of a kind that is not added here; names the layer.

    Example:
        >>> weights = effective_weights(torch.nn.Linear(2, 1))
        >>> [(name, tuple(make().shape)) for name, make in weights.items()]
        [('weight', (1, 2)), ('bias', (1,))]
    """
    with plain_names(model):
        check_adapters(model)
        adapted = {f"{name}.base_layer.weight": layer for name, layer in _adapted(model)}
        owners, weights = dict(model.named_modules()), dict(model.named_parameters())
    made: dict[str, WeightMaker] = {}
    for name, weight in weights.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer = adapted.get(name)
        base = _later(full_weight, owners[name.rpartition(".")[0]]) if is_packed(weight) else _later(whole, weight)
        made[_plain(name)] = base if layer is None else _later(_with_adapter, base, layer)
    return made


def _later(make: Callable[..., Tensor], *args: Any) -> WeightMaker:
    return lambda: make(*args)


def _plain(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    name = name.replace(".base_layer.", ".")
    before, found, behind = name.partition(".modules_to_save.")
    return f"{before}.{behind.partition('.')[2]}" if found else name


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "base_layer"))


@torch.no_grad()
def _with_adapter(base: WeightMaker, layer: Any) -> Tensor:
    """`W + s·B·A` of one layer in float32; with DoRA (arXiv 2402.09353) its rows are scaled to their trained norms."""
    (adapter,) = layer.active_adapters
    total: Tensor
    if adapter in layer.lora_embedding_A:
        low, high = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        total = base().float() + (whole(high).float() @ whole(low).float()).T * layer.scaling[adapter]
        return total
    low, high = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    delta = whole(high).float() @ whole(low).float() * layer.scaling[adapter]
    turned = bool(layer.fan_in_fan_out)  # the base layer stores its weight as (in, out)
    total = base().float() + (delta.T if turned else delta)
    if not _variant(layer, adapter):
        return total
    rows = total.T if turned else total
    scale = whole(layer.lora_magnitude_vector[adapter].weight).float() / rows.norm(dim=1)
    total *= scale if turned else scale[:, None]
    return total


def _variant(layer: Any, adapter: str) -> str:
    """The name of a layer's variant of LoRA; empty for plain LoRA."""
    found = getattr(layer, "lora_variant", {}).get(adapter)
    return type(found).__name__ if found is not None else ""


def check_adapters(model: torch.nn.Module) -> None:
    """Refuse adapters that `effective_weights` would not add, or not rightly.

    Raises:
        ValueError: names the first such layer and the reason.
    """
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        why = ""
        if hasattr(module, "base_layer"):
            why = _refusal(module)
        elif type(module).__module__.startswith("peft.") and hasattr(module, "original_module"):
            kind = type(module).__name__
            why = "" if kind == "ModulesToSaveWrapper" else f"{kind} is not supported"
        else:
            continue
        below = module.base_layer if hasattr(module, "base_layer") else module.original_module
        if not why and any(shared[id(weight)] > 1 for weight in below.parameters()):
            why = "its weight is tied to another layer's, which would change with it"
        if why:
            raise ValueError(f"the adapter of {name} cannot be added to its weight: {why}; leave this layer out")


def _refusal(layer: Any) -> str:
    """The reason why a layer's adapter cannot be added here; empty if it can."""
    kind, adapters = type(layer), list(layer.active_adapters)
    if (kind.__module__, kind.__name__) not in _LAYERS:
        return f"{kind.__module__}.{kind.__name__} is not supported, only LoRA and DoRA of linear and embedding layers"
    if len(adapters) != 1:
        return f"it has {len(adapters)} active adapters instead of one"
    variant = _variant(layer, adapters[0])
    if variant and (variant != "DoraLinearVariant" or kind.__name__ != "Linear"):
        return f"{variant} is not supported on {kind.__name__.lower()} layers"
    if layer.merged or layer.disable_adapters:
        return "it is merged or switched off"
    if getattr(layer, "lora_bias", {}).get(adapters[0]):
        return "lora_bias is not supported"
    return ""
