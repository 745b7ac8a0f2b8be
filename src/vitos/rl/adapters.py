"""Low-rank adapters (PEFT) on the language model of a policy; needs the `lora` extra."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch

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


def merged_copy(policy: SparseVLM, model: Any) -> SparseVLM:
    """A policy that can be saved while training goes on: the policy itself, or a copy with adapters merged.

    The copy is needed because merging in place and unmerging again would round the weights.
    """
    if not is_adapted(model):
        return policy
    backbone, adapted = copy.copy(policy.backbone), cast(Any, copy.deepcopy(model))
    backbone.model = adapted.merge_and_unload()
    return SparseVLM(backbone, policy.spec)
