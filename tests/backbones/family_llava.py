"""Tiny LLaVA models: LLaVA-1.5, HuatuoGPT-Vision, LLaVA-Med and nano-real with another width and depth."""

from __future__ import annotations

from typing import Any

import torch
from tests.backbones.family import redraw, stand_in_tokenizer
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vitos.backbones.base import Backbone
from vitos.backbones.llava import Llava

# As in LLaVA-1.5: images first, wherever they are in the message; the tokenizer adds the first token.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As in HuatuoGPT-Vision: role names are ordinary text.
HUATUO_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


CLIP = {"model_type": "clip_vision_model", "image_size": 336, "projection_dim": 64}
# Positions for 13 x 13 patches, interpolated to the 10 x 10 that the image processor makes.
DINOV2 = {"model_type": "dinov2", "image_size": 182, "mlp_ratio": 2}


def _llava(text: dict[str, Any], tokenizer: Any, processor: Any, seed: int, tower: dict[str, Any] = CLIP) -> Llava:
    """CLIP ViT-L/14-336 or DINOv2-S/14 with another width and depth, and a small language model."""
    width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    vision = tower | {"patch_size": 14, "num_hidden_layers": 3}
    small = {"vocab_size": 400, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlavaConfig(
        vision_config=vision | width,
        text_config=small | width | text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[1, -1] if tower is DINOV2 else -2,  # as nano-real's; LLaVA-1.5's
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return Llava(redraw(model, seed), tokenizer, processor)


SQUARE_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def llava_1_5() -> Llava:
    """LLaVA-1.5: Llama, the shortest edge resized to 336, the middle cropped."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = stand_in_tokenizer(special, ["<image>"], VICUNA_TEMPLATE)
    return _llava({"model_type": "llama"}, tokenizer, CLIPImageProcessorPil(**SQUARE_336), seed=5)


def huatuo_vision() -> Llava:
    """HuatuoGPT-Vision-7B (2024): Qwen2, the image padded to a square with CLIP's mean colour."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    more = ["<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = stand_in_tokenizer(special, more, HUATUO_TEMPLATE)
    text = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return _llava(text, tokenizer, LlavaImageProcessorPil(**SQUARE_336, do_pad=True), seed=6)


def llava_med() -> Llava:
    """LLaVA-Med v1.5: Mistral, padded to a square."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    template = (
        "{{ bos_token }}{% for message in messages %}[INST] {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} [/INST]{% endfor %}"
    )
    tokenizer = stand_in_tokenizer(special, ["<image>"], template)
    text = {"model_type": "mistral", "sliding_window": None}
    return _llava(text, tokenizer, LlavaImageProcessorPil(**SQUARE_336, do_pad=True), seed=7)


def llava_dinov2() -> Llava:
    """nano-real: DINOv2, the image stretched to a square of another size than the encoder was trained with."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = stand_in_tokenizer(special, ["<image>"], VICUNA_TEMPLATE)
    processor = BitImageProcessorPil(size={"height": 140, "width": 140}, do_center_crop=False)
    return _llava({"model_type": "llama"}, tokenizer, processor, seed=8, tower=DINOV2)


def llava_processor(backbone: Backbone) -> Any:
    return LlavaProcessor(
        backbone.image_processor,
        backbone.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=backbone.tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
