"""Models of random weights and questions for measurements of speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.models import random_backbone
from vitos.policy.vlm import SparseVLM


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to measure.

    Attributes:
        text: what it is, for tables.
        side: pixels of its square images.
        build: the policy, its weights drawn from torch's global generator.
    """

    text: str
    side: int
    build: Callable[[], SparseVLM]


def build_nano() -> SparseVLM:
    """The embedded model with its weights drawn anew."""
    policy = SparseVLM.from_pretrained("nano")
    return _redrawn(policy, policy.backbone.model.config, policy.backbone.image_processor)


def build_scaled() -> SparseVLM:
    """Qwen2.5-VL-7B with a 14th of its width and a 7th of its depth; nano's vocabulary and a small encoder.

    Patches, windows, the ratio of widths and one key-value head for several queries are as in the large model; the
    head has 4 % of the weights (there 7 %).
    """
    policy = SparseVLM.from_pretrained("nano")
    small = policy.backbone.model.config.to_dict()
    text = small["text_config"] | {
        "hidden_size": 256,
        "intermediate_size": 1352,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = small["vision_config"] | {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [3],
        "out_hidden_size": 256,
    }
    config = Qwen2_5_VLConfig(**small | {"text_config": text, "vision_config": vision})
    size = {"shortest_edge": 56**2, "longest_edge": 1024**2}
    return _redrawn(policy, config, Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size))


SHAPES = {
    "nano": Shape("nano, 64 visual tokens", 128, build_nano),
    "nano-256": Shape("nano, 256 visual tokens", 256, build_nano),
    "qwen2.5-vl": Shape("Qwen2.5-VL scaled down, 256 visual tokens", 448, build_scaled),
}


def _redrawn(policy: SparseVLM, config: Any, processor: Any) -> SparseVLM:
    backbone = random_backbone(
        config,
        tokenizer=policy.backbone.tokenizer,
        image_processor=processor,
        device=policy.backbone.device,
        generation_config=policy.backbone.model.generation_config,
        seed=None,
    )
    return SparseVLM(backbone, policy.spec)


def question_text(index: int) -> str:
    """A question with its options."""
    return f"<image>Which kind is in quadrant {index}?\nA. nodule\nB. cyst\nC. mass\nD. none"


def random_image(folder: Path, index: int, side: int) -> Path:
    """A file of noise."""
    path = folder / f"{index}.png"
    pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
