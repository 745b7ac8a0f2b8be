"""Tiny Qwen2.5-VL and Qwen3-VL models, with the tokenizer of nano."""

from __future__ import annotations

import copy
from typing import Any

import torch
from scripts.nano_model import build_nano
from tests.backbones.family import built, redraw, without_video
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.base import Backbone
from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.backbones.qwen3_vl import Qwen3VL


def nano() -> Qwen25VL:
    """The shape of `nano`: tied embeddings, full attention in every vision block, 8-pixel patches, merge 2."""
    backbone = build_nano()
    redraw(backbone.model, 1)
    return backbone


def _qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], limits: tuple[int, int], seed: int) -> Qwen25VL:
    """A model with the tokenizer of nano and untied embeddings with 800 logits, more than it has tokens."""
    base = built(nano)
    config = copy.deepcopy(base.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    for name, value in ({"vocab_size": 800, "num_hidden_layers": 3} | text).items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = config.text_config.layer_types[:3]
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(base.model.generation_config)
    model.generation_config.eos_token_id = [2, 0]  # two stop tokens, as Qwen2.5-VL has
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
    )
    return Qwen25VL(redraw(model, seed), base.tokenizer, processor)


def windowed() -> Qwen25VL:
    """An unusual shape: windowed vision attention, 4-pixel patches, merge 3."""
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    text = {"hidden_size": 48, "intermediate_size": 64, "rope_parameters": rope} | heads
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    patches = {"patch_size": 4, "spatial_merge_size": 3, "window_size": 24, "fullatt_block_indexes": [1]}
    return _qwen2_5_vl(text, vision | patches, (24**2, 96**2), seed=2)


def qwen2_5_vl() -> Qwen25VL:
    """The encoder of Qwen2.5-VL-7B with another width and depth: 14-pixel patches, merge 2, windows of 112 px.

    The pixel limits are those of the published model.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": rope} | heads
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
    patches = {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    return _qwen2_5_vl(text, vision | patches, (3136, 12845056), seed=3)


def qwen2_5_vl_processor(backbone: Backbone) -> Any:
    make = without_video(Qwen2_5_VLProcessor)
    return make(backbone.image_processor, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template)


def qwen3_vl(experts: int = 0) -> Qwen3VL:
    """Qwen3-VL with another width and depth: 16-pixel patches, merge 2, interleaved M-RoPE, three deep streams.

    Args:
        experts: number of experts, of which each token uses two; 0 for a dense model.
    """
    base = built(nano)
    ids = {name: getattr(base.model.config, name) for name in dir(base.model.config) if name.endswith("_token_id")}
    vision = {"depth": 5, "hidden_size": 48, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 2, 3]}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config_class = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    model = model_class(
        config_class(
            text_config=text | (mixture if experts else {}),
            vision_config=vision,
            **{name: ids[name] for name in names},
        )
    )
    model.generation_config = copy.deepcopy(base.model.generation_config)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VL(redraw(model, 4), base.tokenizer, processor)


def qwen3_vl_moe() -> Qwen3VL:
    """The same with four experts per layer, run one after the other: their grouped product has no float64."""
    backbone = qwen3_vl(experts=4)
    backbone.model.set_experts_implementation("eager")
    return backbone


def qwen3_vl_processor(backbone: Backbone) -> Any:
    make = without_video(Qwen3VLProcessor)
    return make(backbone.image_processor, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template)
