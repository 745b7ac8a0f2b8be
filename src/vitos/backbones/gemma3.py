"""Gemma 3 and models made from it (MedGemma): 256 visual tokens per view, which attend to one another both ways.

What sets it apart:

- The image is stretched to 896 x 896 px, and 4 x 4 patches are averaged into one token: 16 x 16 tokens for any image.
  Pan-and-scan (off unless the image processor has `do_pan_and_scan: true`) adds crops of a long image. Each crop is a
  further view with its own run of tokens, and a sentence introduces them.
- The tokens of one view attend to one another in both directions; everything else is causal. The library finds the
  views as runs of `token_type_ids == 1`. The text between two views stays when tokens are dropped, so the kept tokens
  of each view are still a run. While decoding, no token types are passed and all attention is causal. That is correct
  because a prompt is never cut before its last visual token (`Prompt.head`).
- Five layers in six have a sliding window (1024 tokens), which the library counts in tokens of the cache, not in
  positions. A sparse prompt therefore reaches further back than the dense one if the dense one is longer than the
  window. Up to that length, both see everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitos.backbones.base import Backbone, Capabilities, VisionGeometry
from vitos.core.geometry import WHOLE_IMAGE, Rect, TokenGrid, View
from vitos.core.prompt import PromptBatch, VisualTokens

# What the library's processor uses for settings that a checkpoint leaves out (they are null in the published ones).
PAN_AND_SCAN: dict[str, int | float | bool] = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class Gemma3(Backbone):
    """Backbone of `Gemma3ForConditionalGeneration`.

    Raises:
        ValueError: for flash attention, where the library uses a causal mask everywhere and does not say so.
    """

    model_types = ("gemma3",)
    capabilities = Capabilities(
        several_images=True, extra_streams=False, native_coordinates="normalized", bidirectional_views=True
    )

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(model, tokenizer, image_processor)
        attention = str(model.config.get_text_config()._attn_implementation)
        if "flash" in attention:
            raise ValueError(
                f"attn_implementation {attention!r}: Gemma 3's image tokens attend in both directions, which it "
                "cannot express; use 'sdpa'"
            )

    @property
    def geometry(self) -> VisionGeometry:
        vision, size, pan = self.model.config.vision_config, self.image_processor.size, self._pan_and_scan
        pixels = size["height"] * size["width"]
        merge = vision.image_size // vision.patch_size // self._tokens_per_side
        return VisionGeometry(
            patch_size=vision.patch_size,
            merge_size=merge,
            min_pixels=pixels,
            max_pixels=pixels,
            rules=pan if pan["do_pan_and_scan"] else {"do_pan_and_scan": False},
        )

    @classmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        """The tokens of one view; each crop of pan-and-scan would add the same number."""
        return int(config.mm_tokens_per_image)

    @property
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    @property
    def image_marker(self) -> str:
        return str(self.tokenizer.boi_token)

    def image_text(self, visual: VisualTokens) -> str:
        """Each view as a run of placeholders between two marks, the crops after a sentence that introduces them."""
        whole, *crops = (
            f"\n\n{self.tokenizer.boi_token}{self.visual_token * view.num_tokens}{self.tokenizer.eoi_token}\n\n"
            for view in visual.grid.views
        )
        if not crops:
            return whole
        introduced = " ".join(crops)
        return f"Here is the original image {whole} and here are some crops to help you see better {introduced}"

    def encode(self, images: Sequence[Image.Image]) -> list[VisualTokens]:
        if not images:
            return []
        pixels = self.image_processor(images=list(images), return_tensors="pt", **self._pan_and_scan)
        features = self.model.model.get_image_features(
            pixels["pixel_values"].to(self.device), return_dict=True
        ).pooler_output
        size, side = self.image_processor.size, self._tokens_per_side
        per_image = features.split([1 + int(crops) for crops in pixels["num_crops"]])  # each (views, 256, hidden)
        return [
            VisualTokens(
                views.flatten(0, 1),
                TokenGrid(tuple(View(rect, side, side) for rect in (WHOLE_IMAGE, *self._crops(image)))),
                resized=(size["width"], size["height"]),
            )
            for image, views in zip(images, per_image, strict=True)
        ]

    def model_inputs(self, batch: PromptBatch) -> dict[str, Any]:
        """The common arguments, and the places of the visual tokens for the bidirectional part of the mask."""
        is_visual = (batch.input_ids == self.visual_token_id) & batch.attention_mask.bool()  # (B, T)
        return super().model_inputs(batch) | {"token_type_ids": is_visual.long()}

    @property
    def _tokens_per_side(self) -> int:
        """Number of visual tokens along a side of a view."""
        return math.isqrt(self.model.config.mm_tokens_per_image)

    @property
    def _pan_and_scan(self) -> dict[str, int | float | bool]:
        """The settings of pan-and-scan that apply."""
        given = {name: getattr(self.image_processor, name, None) for name in PAN_AND_SCAN}
        return PAN_AND_SCAN | {name: value for name, value in given.items() if value is not None}

    def _crops(self, image: Image.Image) -> list[Rect]:
        """Rectangles of the crops, found by cutting images whose pixels are their column and row numbers."""
        settings = self._pan_and_scan
        if not settings.pop("do_pan_and_scan"):
            return []
        width, height = image.size
        numbers = (np.arange(width), np.arange(height)[:, None])
        columns, rows = (
            self.image_processor.pan_and_scan(np.broadcast_to(n, (1, height, width)), **settings) for n in numbers
        )
        return [
            Rect(
                float(x[0, 0, 0]) / width,
                float(y[0, 0, 0]) / height,
                float(x[0, 0, -1] + 1) / width,
                float(y[0, -1, 0] + 1) / height,
            )
            for x, y in zip(columns, rows, strict=True)
        ]
