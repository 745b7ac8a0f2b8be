"""Work of several processes together: sum figures and gradients, sample with sharded weights, move optimizer states.

Each process takes whole questions, so baselines and advantages need no other process. Shared are the token count in
the mean of the loss, the gradients and the figures. There are two ways, both set up by accelerate:

- DDP: each process has all weights. The number of micro-batches, and so of backward passes, differs between processes.
  Therefore the module inside the wrapper runs, and the gradients are summed once, at the end.
- FSDP2: each forward and backward pass gathers weights from all processes and shards the gradient again, so all run
  the same number of micro-batches. For sampling, whose length is not known before, `whole_weights` gathers them once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vitos.backbones.base import Backbone
from vitos.engines.weights import plain_names

T = TypeVar("T")


def runnable(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose forward pass is called: the one inside a DDP wrapper; any other model as it is."""
    inner: torch.nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights of `model` are spread over several processes (FSDP2)."""
    return isinstance(model, FSDPModule)


def set_up_sharding(accelerator: Accelerator, backbone: Backbone) -> None:
    """Set the options of accelerate's FSDP plugin that follow from the trainer; called before the model is prepared.

    The frozen vision encoder stays whole on each device, since it runs outside of the model's forward pass; layers are
    sharded one by one.

    Raises:
        ValueError: for FSDP1, and for loading on one process only, for which it is too late here.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("set fsdp_config.version: 2; FSDP1 cannot hold both frozen and trained weights")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("set fsdp_config.cpu_ram_efficient_loading: false; the policy is loaded before it is sharded")
    vision = {id(m) for root in backbone.vision_modules for m in root.modules()}
    layers = {type(m).__name__ for m in backbone.model.modules() if id(m) not in vision}
    plugin.ignored_modules = [module.to(accelerator.device) for module in backbone.vision_modules]
    plugin.transformer_cls_names_to_wrap = sorted(layers & set(backbone.model._no_split_modules or ()))
    plugin.set_state_dict_type("FULL_STATE_DICT")


def reshard(model: torch.nn.Module) -> None:
    """Shard all weights of an FSDP2 model again; a forward pass without a backward pass leaves the outermost whole."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


@contextmanager
def whole_weights(model: torch.nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Let each process hold all weights of an FSDP2 model, and sample at its own pace, while the block runs.

    This costs one gathering and, for the time of the block, the memory of a whole copy of the language model in the
    computing dtype on each device. Other models are left as they are.

    Args:
        model: the model.
        reshard_after_forward: whether layers are sharded again after a forward pass outside of the block.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        head = model.get_output_embeddings() if units else None  # type: ignore[operator]
        for unit in units:
            unit.reshard()
            # The root and the head's unit run last and first: accelerate leaves them whole in between.
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)
        if isinstance(head, FSDPModule):
            head.set_reshard_after_forward(False, recurse=False)


# --- figures --------------------------------------------------------------------------------------------------------


def sums(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def maximum(accelerator: Accelerator, value: float) -> float:
    """The largest of all processes' values."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def gathered(accelerator: Accelerator, items: list[T]) -> list[T]:
    """The items of all processes, in the order of the processes; they must not contain large tensors."""
    if accelerator.num_processes == 1:
        return items
    everything: list[T] = gather_object(items)
    return everything


# --- gradients ------------------------------------------------------------------------------------------------------


def sum_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Sum the gradients of replicated weights over processes; FSDP's backward pass does so for sharded ones."""
    if accelerator.num_processes == 1 or is_sharded(model):
        return
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if parameter.grad is None:  # no question of this process carried signal, but one of another did
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def gradient(model: torch.nn.Module) -> Tensor:
    """All gradients of this process as one float32 vector; for sharded weights, those of its shards."""
    return torch.cat([_local(p.grad if p.grad is not None else torch.zeros_like(p)) for p in _trained(model)])


def gradient_products(
    accelerator: Accelerator, model: torch.nn.Module, vectors: Sequence[Tensor]
) -> list[list[float]]:
    """Inner products of all pairs of gradients (from `gradient`), summed over processes."""
    if accelerator.num_processes > 1 and not is_sharded(model):
        for vector in vectors:
            dist.all_reduce(vector)
    products = [float(a.double() @ b.double()) for a in vectors for b in vectors]
    if is_sharded(model):
        products = sums(accelerator, products)
    size = len(vectors)
    return [products[row * size : (row + 1) * size] for row in range(size)]


def gradient_norm(accelerator: Accelerator, model: torch.nn.Module) -> float:
    """Norm of the summed gradients; 0 without any, not finite if one of them is not."""
    squares = [_local(p.grad).double().square().sum() for p in _trained(model) if p.grad is not None]
    total = float(torch.stack(squares).sum()) if squares else 0.0
    if is_sharded(model):
        (total,) = sums(accelerator, [total])
    return math.sqrt(total) if total >= 0 else math.nan


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).float().flatten()


# --- states of model and optimizer ----------------------------------------------------------------------------------


def whole_weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The `state_dict` with sharded tensors gathered on the CPU; all processes must call it together.

    A tied weight appears under its first name only, as in a file of `save_pretrained`.
    """
    with plain_names(model):
        once = {name for name, _ in model.named_parameters()}
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
        return {name: _whole(value) for name, value in model.state_dict().items() if name not in tied}


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with sharded tensors gathered on the CPU; all processes must call it together.

    The result is the state of an optimizer in one process, so a run can go on with another number of processes.
    """
    return {
        **state,
        "state": {index: {k: _whole(v) for k, v in values.items()} for index, values in state["state"].items()},
    }


def sharded_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of `whole_state`, sharded like the optimizer's parameters."""

    def placed(value: Any, like: Tensor) -> Any:
        if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape and value.ndim:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value

    return {
        **state,
        "state": {
            index: {k: placed(v, parameters[int(index)]) for k, v in values.items()}
            for index, values in state["state"].items()
        },
    }
