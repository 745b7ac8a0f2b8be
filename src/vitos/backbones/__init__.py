"""Model families: one file per family, and everything that only one family needs is in its file.

Read in this order:

- `base.py`: `Backbone`, what a family defines and what all of them share (prompts, special tokens, boxes as text).
- `qwen2_5_vl.py` with `qwen.py`, then `llava.py`: two families. An image of any size and M-RoPE there, a square and
  1-D positions here. `qwen3_vl.py`, `gemma3.py` and `internvl.py` differ in what their first lines say.
- `evidence_head.py`: scores of visual tokens inside the first pass, for plan one_pass.
- `patching.py` and `attention.py`: how one pass of an unmodified model is changed or observed.
- `quantized.py`: frozen weights in 4 bits.

A family is found by listing this folder, or by an entry point of the group `vitos.backbones`; no list names it. Its
class has `model_types`, the values of `model_type` in the checkpoints that it loads. docs/backbone.md says how to add
one, and what to test.

Below: `families` finds them, `load_backbone` loads a checkpoint with the right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin

# Not from the top level, where transformers 5.17 asks for torchvision even if the processor does without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vitos.backbones.base import Backbone, Capabilities, CoordinateStyle, VisionGeometry, VllmModel
from vitos.backbones.companions import companions
from vitos.backbones.quantized import nf4_config
from vitos.core.registry import Registry

BACKBONES = Registry(
    "vitos.backbones",
    "vitos.backbones",
    helpers=("attention", "base", "companions", "evidence_head", "patching", "quantized", "qwen"),
)
"""Files with a family, by name. The helpers define none."""


def families() -> dict[str, type[Backbone]]:
    """Import all families: `model_type` → class.

    Raises:
        ValueError: if a file defines no family, `model_types` is not a tuple, or two families name one model type.
    """
    found: dict[str, type[Backbone]] = {}
    for _, module in BACKBONES.modules():
        for family in _defined(module):
            for model_type in _own_model_types(family):
                other = found.setdefault(model_type, family)
                if other is not family:
                    raise ValueError(
                        f"{_place(other)} and {_place(family)} both name the model type {model_type!r}; remove it "
                        "from the `model_types` of one of them"
                    )
    return found


def family_of(model_type: str) -> type[Backbone]:
    """The family of a `model_type`.

    Example:
        >>> family_of("qwen3_vl_moe").__name__
        'Qwen3VL'

    Raises:
        ValueError: if there is none; the message lists the known model types.
    """
    known = families()
    if model_type not in known:
        raise ValueError(_unknown(model_type, known))
    return known[model_type]


def _own_model_types(family: type[Backbone]) -> tuple[str, ...]:
    """The model types that a class itself names; those of a parent class belong to the parent."""
    named = vars(family).get("model_types", ())
    if not isinstance(named, tuple) or not all(isinstance(name, str) for name in named):
        raise ValueError(f'{_place(family)}: model_types must be a tuple of names, such as ("my_vl",), got {named!r}')
    return named


def _defined(module: ModuleType) -> list[type[Backbone]]:
    """The families that a module defines, without those that it imports."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Backbone)]
    own = [value for value in dict.fromkeys(classes) if value.__module__ == module.__name__]
    found = [value for value in own if _own_model_types(value)]
    if not found:
        raise ValueError(
            f'{module.__name__} defines no subclass of Backbone with model_types = ("...",); add them, or name the '
            f"module that defines it in the entry point ({BACKBONES.group})"
        )
    return found


def _unknown(model_type: str, known: Iterable[str]) -> str:
    return (
        f"no backbone for model type {model_type!r}; known: {', '.join(known)}; docs/backbone.md says how to add one"
    )


def _place(family: type[Backbone]) -> str:
    return f"{family.__module__}.{family.__qualname__}"


def load_backbone(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    quantization: str | None = None,
) -> Backbone:
    """Load a checkpoint with its family's backbone.

    The tokenizer and the PIL image processor are loaded separately: the combined Qwen processor requires a video
    processor, which requires torchvision.

    Args:
        path: folder of the checkpoint, or its id on the Hugging Face hub.
        dtype: number format of the weights; "auto" for the one of the checkpoint.
        device: where the model is put; None leaves it on the CPU.
        attn_implementation: the library's name of the attention function.
        trust_remote_code: whether code that comes with the checkpoint may run.
        min_pixels: smallest area of the resized image in pixels; None for the checkpoint's.
        max_pixels: largest area.
        quantization: "nf4" to keep the language model's linear layers in 4 bits (`quantized.nf4_config`).

    Raises:
        ImportError: for a quantization whose package is not installed.
        ValueError: if no family has the checkpoint's `model_type`, there is no chat template, or the family's image
            size cannot be limited.
    """
    known = families()  # before the config is read: a family's file may register the library's classes for its type
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    family = known.get(config.model_type)
    if family is None:
        raise ValueError(f"{path}: {_unknown(config.model_type, known)}")
    placed: dict[str, Any] = {}
    if quantization is not None:  # cannot be moved later
        placed = {"quantization_config": nf4_config(config), "device_map": {"": device or "cpu"}}
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **placed
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer.chat_template = processor_template(path) or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: neither the tokenizer nor the processor has a chat template; save one in the same folder as "
            "chat_template.jinja"
        )
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    limits: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code, **limits)
    if device is not None and not placed:
        model = model.to(device)
    backbone = family(model.eval(), tokenizer, processor)
    backbone.companions = companions(path)
    for name, value in limits.items():
        if getattr(backbone.geometry, name) != value:
            raise ValueError(
                f"{path}: {name} {value} has no effect on {family.__name__}, whose image processor decides the "
                f"size itself ({backbone.geometry}); remove it"
            )
    return backbone


def processor_template(path: str | Path) -> str | None:
    """The chat template that a checkpoint's combined processor would use, or None if there is none.

    It can be in a file that no tokenizer reads: `processor_config.json`, else `chat_template.json`, else
    `chat_template.jinja` (`ProcessorMixin.get_processor_dict` decides). If it has several by name, the default counts.
    """
    template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    return str(template) if template else None


__all__ = [
    "BACKBONES",
    "Backbone",
    "Capabilities",
    "CoordinateStyle",
    "VisionGeometry",
    "VllmModel",
    "families",
    "family_of",
    "load_backbone",
    "processor_template",
]
