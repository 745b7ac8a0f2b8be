"""Gemma 3 and its descendants (MedGemma): 256 tokens for every view, which attend to one another in both directions.

What is peculiar:

- The image is stretched to 896 x 896 px, and 4 x 4 patches are averaged into one token: 16 x 16 tokens, whatever the
  image. Pan-and-scan (off unless the image processor says `do_pan_and_scan: true`) adds crops of a long image, each
  another view with its own run of tokens and a sentence around them all.
- The tokens of one view attend to one another in both directions; everything else is causal. The library finds the
  views as runs of `token_type_ids == 1`. The text between two views stays when tokens are dropped, so the kept tokens
  of a view are still one run, and of two views two. While decoding no token types are passed and all is causal; that
  is right because a prompt is never cut before its last visual token (`Prompt.head`).
- Five layers in six see a sliding window (1024 tokens), which the library counts in tokens of the cache, not in
  positions. So a sparse prompt reaches further back than the dense one where the dense one is longer than the window;
  up to that length both see everything.
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

# What the library's processor takes where a checkpoint's image processor says nothing (published ones say null).
PAN_AND_SCAN: dict[str, int | float | bool] = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class Gemma3(Backbone):
    """`Gemma3ForConditionalGeneration` behind the package's protocol.

    Raises:
        ValueError: for flash attention, whose masks in the library are causal everywhere, without a word.
    """

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
            vision.patch_size, merge, pixels, pixels, pan if pan["do_pan_and_scan"] else {"do_pan_and_scan": False}
        )

    @classmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        """Without pan-and-scan, whose crops have as many tokens each."""
        return int(config.mm_tokens_per_image)

    @property
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    @property
    def image_marker(self) -> str:
        return str(self.tokenizer.boi_token)

    def image_text(self, visual: VisualTokens) -> str:
        """Every view is a run of placeholders between two marks; crops are introduced by a sentence."""
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
        per_image = features.split([1 + int(crops) for crops in pixels["num_crops"]])
        return [
            VisualTokens(
                views.flatten(0, 1),
                TokenGrid(tuple(View(rect, side, side) for rect in (WHOLE_IMAGE, *self._crops(image)))),
                resized=(size["width"], size["height"]),
            )
            for image, views in zip(images, per_image, strict=True)
        ]

    def model_inputs(self, batch: PromptBatch) -> dict[str, Any]:
        """Beside the common ones, where the visual tokens stand: the bidirectional part of the attention mask."""
        is_visual = (batch.input_ids == self.visual_token_id) & batch.attention_mask.bool()
        return super().model_inputs(batch) | {"token_type_ids": is_visual.long()}

    @property
    def _tokens_per_side(self) -> int:
        """Visual tokens along either side of a view."""
        return math.isqrt(self.model.config.mm_tokens_per_image)

    @property
    def _pan_and_scan(self) -> dict[str, int | float | bool]:
        """Its settings in force."""
        given = {name: getattr(self.image_processor, name, None) for name in PAN_AND_SCAN}
        return PAN_AND_SCAN | {name: value for name, value in given.items() if value is not None}

    def _crops(self, image: Image.Image) -> list[Rect]:
        """Rectangles of the crops that pan-and-scan cuts, read off images of column and of row numbers."""
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
