"""Frozen weights in 4 bits (NF4) under adapters, as QLoRA has them; needs the `quant` extra (bitsandbytes).

Only linear layers of the language model are quantized: not the vision encoder, whose output is cached and compared,
and not the head, whose logits are the policy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def nf4_config(config: Any) -> Any:
    """transformers' configuration of a model in NF4 with double quantization; products are computed in bfloat16.

    Args:
        config: the model's configuration.

    Raises:
        ImportError: without bitsandbytes; says what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "model.quantization: nf4 needs bitsandbytes: pip install 'vitos[quant]', or leave the quantization out"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=full_modules(config),
    )


def full_modules(config: Any) -> list[str]:
    """Names of the modules that stay in full: everything of the model outside of the language model's layers."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    names = {id(module): name for name, module in model.named_modules()}
    inside = names[id(model.model.language_model.layers)]
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(f"{inside}.")
    )


def is_quantized(model: Any) -> bool:
    """Whether linear layers of `model` are kept in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def full_weight(layer: torch.nn.Module) -> Tensor:
    """The weight of a linear layer as numbers, float32; of a quantized one what its 4 bits stand for."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float()


def is_packed(weight: Tensor) -> bool:
    """Whether a parameter holds weights in 4 bits, which only its layer can read."""
    return hasattr(weight, "quant_state")


@contextmanager
def quantizer_set_aside(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write the weights that it is given: with a quantizer it writes the model's own, in 4 bits.

    Models without a quantizer are left as they are.
    """
    quantizer = vars(model).pop("hf_quantizer", None)
    try:
        yield
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
