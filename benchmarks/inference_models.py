"""Models whose speed is measured: nano, and the layer shapes of published models with random weights.

Only as many layers as a machine can hold are built, the same share of each part (language model, vision encoder,
vocabulary), so that the parts keep their proportions and ratios of times are those of the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from scripts.nano_model import build_nano
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.models import random_backbone
from vitos.backbones.base import Backbone
from vitos.doctor.shapes import KNOWN

MODELS = ("nano", "Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct")


def build_model(name: str, parts: int, dtype: torch.dtype, device: torch.device) -> tuple[Backbone, str]:
    """A model and one sentence on what it is.

    Args:
        name: one of `MODELS`.
        parts: 1, 2 or 4: a published model is built with one layer in so many; nano is always whole.

    Raises:
        ValueError: for another name or share.
    """
    if name not in MODELS or parts not in (1, 2, 4):
        raise ValueError(f"model must be one of {', '.join(MODELS)} and parts 1, 2 or 4, got {name} and {parts}")
    with torch.device("cpu"):  # whatever the caller's default: its starting values are computed
        nano = build_nano()
    if name == "nano":
        # Its image processor stops at 256 px a side; a benchmark of larger images needs larger ones.
        nano.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 4096**2}
        nano.model.to(device, dtype).eval()
        return nano, "the architecture of nano (1.6 million parameters), random weights"
    values, said = _shrunk(name, parts, nano.model.config)
    backbone = random_backbone(
        values,
        tokenizer=nano.tokenizer,
        image_processor=Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12_845_056}),
        dtype=dtype,
        device=device,
        generation_config=nano.model.generation_config,
    )
    return backbone, said


def _shrunk(name: str, parts: int, nano: Any) -> tuple[Any, str]:
    """A published configuration with one layer in so many and nano's special tokens, and what it is."""
    values = dict(KNOWN[name])
    text, vision = values["text_config"], values["vision_config"]
    layers, blocks = text["num_hidden_layers"] // parts, vision["depth"] // parts
    values["text_config"] = text | {"num_hidden_layers": layers, "vocab_size": text["vocab_size"] // parts}
    whole = [index for index in vision["fullatt_block_indexes"] if index < blocks]
    values["vision_config"] = vision | {"depth": blocks, "fullatt_block_indexes": whole}
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        values[key] = getattr(nano, key)
    said = (
        f"layer shapes of {name}, random weights: {layers} of {text['num_hidden_layers']} layers, {blocks} of "
        f"{vision['depth']} vision blocks, 1/{parts} of the vocabulary"
    )
    return values, said
