"""Tiny InternVL models, with a stand-in for the tokenizer."""

from __future__ import annotations

from typing import Any

from tests.backbones.family import redraw, stand_in_tokenizer, two_stops, without_video
from tokenizers import AddedToken
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from vitos.backbones.base import Backbone
from vitos.backbones.internvl import InternVL

INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(language_model: str = "qwen2", side: int = 224, max_patches: int = 12) -> InternVL:
    """InternVL3 (Qwen2) or InternVL3.5 (Qwen3) with another width, depth and vocabulary, and tiles of half the 448 px.

    A tile has 8 x 8 tokens of 2 x 2 patches of 14 px. `test_internvl.py` runs the full size once.
    """
    extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra |= {"video_token": "<video>"}
    roles = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    start = AddedToken("<|im_start|>", special=True, normalized=False)
    tokenizer = stand_in_tokenizer(roles, list(extra.values()), INTERNVL_TEMPLATE, added=[start], extra=extra)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8192}
    sizes = {"vocab_size": len(tokenizer) + 8, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config={"model_type": language_model, "tie_word_embeddings": False} | sizes | heads,
        vision_config=vision | {"image_size": [side, side], "patch_size": [14, 14]},
        image_seq_length=(side // 28) ** 2,
        image_token_id=tokenizer.context_image_token_id,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config = two_stops(tokenizer, "<|im_end|>", "<|endoftext|>")
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
        crop_to_patches=False,  # as published; the library's processor cuts tiles anyway
        min_patches=1,
        max_patches=max_patches,
    )
    return InternVL(redraw(model, 6), tokenizer, processor)


def internvl3_5() -> InternVL:
    return internvl("qwen3")


def internvl_processor(backbone: Backbone) -> Any:
    return without_video(InternVLProcessor)(
        backbone.image_processor,
        backbone.tokenizer,
        None,
        chat_template=backbone.tokenizer.chat_template,
        image_seq_length=backbone.model.config.image_seq_length,
    )
