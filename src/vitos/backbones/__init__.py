"""Model families. Adding one is one file with a `Backbone` subclass and one row in `FAMILIES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin

from vitos.backbones.base import Backbone, Capabilities, CoordinateStyle, VisionGeometry
from vitos.backbones.gemma3 import Gemma3
from vitos.backbones.internvl import InternVL
from vitos.backbones.llava import Llava
from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.backbones.qwen3_vl import Qwen3VL

FAMILIES: dict[str, type[Backbone]] = {
    "gemma3": Gemma3,
    "internvl": InternVL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VL,
    "llava": Llava,
}


def load_backbone(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Backbone:
    """Load a checkpoint folder or hub id with its family's backbone.

    The tokenizer and the PIL image processor are loaded on their own: the combined Qwen processor insists on a video
    processor, which insists on torchvision.

    Raises:
        ValueError: if no family fits the checkpoint's `model_type`, it has no chat template, or no such pixel limits.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"{path}: no backbone for model type {config.model_type!r}; known: {', '.join(FAMILIES)}")
    model: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer.chat_template = processor_template(path) or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: neither the tokenizer nor the processor has a chat template; put one beside them as "
            "chat_template.jinja"
        )
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    limits: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code, **limits)
    backbone = family(model.to(device).eval() if device is not None else model.eval(), tokenizer, processor)
    for name, value in limits.items():
        if getattr(backbone.geometry, name) != value:
            raise ValueError(
                f"{path}: {name} {value} has no effect on {family.__name__}, whose image processor decides the size "
                f"itself ({backbone.geometry}); remove it"
            )
    return backbone


def processor_template(path: str | Path) -> str | None:
    """The chat template that a checkpoint's combined processor would use, or None if it has none of its own.

    It may stand where no tokenizer looks: in `processor_config.json`, else in `chat_template.json`, else in
    `chat_template.jinja` (`ProcessorMixin.get_processor_dict` decides); of several named ones, the default.
    """
    template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    return str(template) if template else None


__all__ = [
    "FAMILIES",
    "Backbone",
    "Capabilities",
    "CoordinateStyle",
    "VisionGeometry",
    "load_backbone",
    "processor_template",
]
