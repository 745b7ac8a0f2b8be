"""`nano-real`, untrained: LLaVA with DINOv2-S and a decoder of two million parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from nano_model import NANO_SPEC, SPECIAL, build_tokenizer, structured_start
from nano_real.features import LAYERS
from nano_real.questions import COUNTS, QUADRANTS, SIZES, make_templates, number_tokens
from nano_real.scenes import KINDS, TUMOURS, Scene
from nano_real.start import hold_circuit
from transformers import AutoConfig, AutoModel, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from vitos.backbones.llava import Llava
from vitos.core.sparsify import KeepRule

# Prompts of few tokens, answers by an option's text; a cell is large beside a platelet, so one more around boxes.
SPEC = dataclasses.replace(NANO_SPEC, keep=KeepRule(margin=1))
WIDTH, DEPTH, HEADS, PIXELS = 192, 4, 6, 224


def corpus(scenes: Sequence[Scene], seed: int) -> Iterable[str]:
    """Text for the tokenizer: numbers, the templates' words, kinds and options."""
    rng = np.random.default_rng(seed)
    templates = make_templates([box for scene in scenes for kind, box in scene.findings if kind in TUMOURS])
    for hundredth in range(101):
        yield from [f"{hundredth / 100:.2f}"] * 200
    for scene in scenes[:600]:
        for template in templates.values():
            if (q := template(scene, rng)) is not None:
                yield f"{q.text}\n{q.about}\n it is there"
    words = " ".join((*KINDS, *COUNTS, *QUADRANTS, *SIZES, "user assistant Locate the evidence, then answer. Answer."))
    for word in words.split():
        yield from [word, " " + word] * 20
    for piece in ("[[", "]]", ", ", "], [", *(f"{letter}." for letter in "ABCD")):
        yield from [piece] * 50


def build_nano_real(vision: Path, scenes: Sequence[Scene], seed: int = 0) -> Llava:
    """The untrained model with tokenizer and image processor; DINOv2's weights are those of the folder."""
    tokenizer = build_tokenizer(corpus(scenes, seed))
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL}
    vision_config = AutoConfig.from_pretrained(vision, dtype="float32")
    vision_config.name_or_path = ""  # a folder of this machine
    config = LlavaConfig(
        vision_config=vision_config,
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "attention_bias": True,
            "max_position_embeddings": 4096,
            # Slow pairs, in which a query meets a key at any distance: with 10,000 too few to tell a place.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
            "dtype": "float32",
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        image_seq_length=(PIXELS // 14) ** 2,
        vision_feature_layer=list(LAYERS),
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    tower = AutoModel.from_pretrained(vision, dtype="float32")
    model.model.vision_tower.load_state_dict(tower.state_dict())
    structured_start(model, number_tokens(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    processor = BitImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, resample=3, do_center_crop=False, do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    backbone = Llava(model, tokenizer, processor)
    hold_circuit(backbone)
    return backbone
