"""Tiny Gemma 3 models, with a stand-in for the tokenizer."""

from __future__ import annotations

from typing import Any

from tests.backbones.family import redraw, stand_in_tokenizer, two_stops
from tokenizers import AddedToken
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from vitos.backbones.base import Backbone
from vitos.backbones.gemma3 import Gemma3

GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma3(side: int = 448, sliding_window: int = 1024, do_pan_and_scan: bool | None = None) -> Gemma3:
    """MedGemma with another width, depth and vocabulary, and half its 896 px, which take 16 times the time.

    An image has 8 x 8 tokens of 4 x 4 patches of 14 px. As in MedGemma, the tokenizer gives the marks of turns no role
    and has tokens for several line breaks in a row. `test_gemma3.py` runs the full size once.
    """
    extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    turns = [AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")]
    tokenizer = stand_in_tokenizer(
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        list(extra.values()),
        GEMMA3_TEMPLATE,
        added=[*turns, *(AddedToken("\n" * count, normalized=False) for count in (2, 3, 4))],
        extra=extra,
    )
    # The model multiplies embeddings by the root of its width. It is 64 here, because 8 is exact in any dtype.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"vocab_size": len(tokenizer) + 8, "hidden_size": 64, "intermediate_size": 64} | heads | layers | ends
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    patches = {"image_size": side, "patch_size": 14, "vision_use_head": False}
    config = Gemma3Config(
        text_config=text | {"sliding_window": sliding_window, "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision | patches,
        mm_tokens_per_image=(side // 14 // 4) ** 2,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config = two_stops(tokenizer, "<eos>", "<end_of_turn>")
    processor = Gemma3ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        resample=2,
        do_pan_and_scan=do_pan_and_scan,
    )
    return Gemma3(redraw(model, 7), tokenizer, processor)


def gemma3_panning() -> Gemma3:
    return gemma3(do_pan_and_scan=True)


def gemma3_processor(backbone: Backbone) -> Any:
    """The library's processor with pan-and-scan as an argument, because it does not read its image processor's."""
    pan = bool(getattr(backbone.image_processor, "do_pan_and_scan", None))
    given = Gemma3Processor.images_kwargs | {"do_pan_and_scan": pan}
    make = type("Gemma3Processor", (Gemma3Processor,), {"images_kwargs": given})
    return make(
        backbone.image_processor,
        backbone.tokenizer,
        chat_template=backbone.tokenizer.chat_template,
        image_seq_length=backbone.model.config.mm_tokens_per_image,
    )
