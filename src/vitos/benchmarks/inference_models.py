"""Models whose speed is measured: nano, and the layer shapes of published models with random weights.

Only as many layers as a machine can hold are built, the same share of each part (language model, vision encoder,
vocabulary), so that the parts keep their proportions and ratios of times are those of the whole model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.base import Backbone
from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.nano.build import build_nano

MODELS = ("nano", "qwen2_5_vl_3b")
TEXT_LAYERS, VISION_BLOCKS, VOCABULARY = 36, 32, 151_936  # of Qwen2.5-VL-3B


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
    nano = build_nano()
    if name == "nano":
        # Its image processor stops at 256 px a side; a benchmark of larger images needs larger ones.
        nano.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 4096**2}
        nano.model.to(device, dtype).eval()
        return nano, "the architecture of nano (1.6 million parameters), random weights"
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY // parts,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": TEXT_LAYERS // parts,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": VISION_BLOCKS // parts,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(7, VISION_BLOCKS // parts, 8)),
            "out_hidden_size": 2048,
        },
        tie_word_embeddings=True,
        **{
            key: getattr(nano.model.config, key)
            for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config = copy.deepcopy(nano.model.generation_config)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12_845_056})
    said = (
        f"layer shapes of Qwen2.5-VL-3B, random weights: {TEXT_LAYERS // parts} of {TEXT_LAYERS} layers, "
        f"{VISION_BLOCKS // parts} of {VISION_BLOCKS} vision blocks, 1/{parts} of the vocabulary"
    )
    return Qwen25VL(model.to(device).eval(), nano.tokenizer, processor), said
