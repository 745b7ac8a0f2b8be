"""InternVL3 and InternVL3.5 in their Hugging Face form: tiles of one image, then a thumbnail of the whole.

What sets them apart: the image is stretched to the grid of tiles (448 px each) whose shape is closest to its own. Each
tile is encoded alone, and pixel shuffle joins 2 x 2 patches into one token: 16 x 16 tokens per tile. If there is more
than one tile, the stretched whole image follows as a last view, so a box keeps tokens in its tiles and in the
thumbnail. Stretching does not change fractions of the image, so the rectangle of each tile is exact.

The library's processor always cuts tiles, whatever `crop_to_patches` is in a checkpoint's image processor (it is false
in the published ones), and so does this one. `max_patches: 1` there turns tiles off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vitos.backbones.base import Backbone, Capabilities, VisionGeometry, VllmModel
from vitos.core.geometry import WHOLE_IMAGE, Rect, TokenGrid, View
from vitos.core.prompt import VisualTokens


class InternVL(Backbone):
    """Backbone of `InternVLForConditionalGeneration`."""

    model_types = ("internvl",)
    capabilities = Capabilities(several_images=True, extra_streams=False, native_coordinates="per_mille")
    vllm_model = VllmModel(
        "VitosInternVLForConditionalGeneration",
        "vitos.engines.vllm.plugin.internvl:VitosInternVL",
        config="vitos.engines.vllm.plugin.rope:ThreeAxes",
    )

    @property
    def geometry(self) -> VisionGeometry:
        processor, tile = self.image_processor, self._tile
        return VisionGeometry(
            patch_size=self.model.config.vision_config.patch_size[0],
            merge_size=round(1 / self.model.config.downsample_ratio),
            min_pixels=processor.min_patches * tile[0] * tile[1],
            max_pixels=processor.max_patches * tile[0] * tile[1],
            rules={
                "tile_width": tile[0],
                "tile_height": tile[1],
                "min_patches": processor.min_patches,
                "max_patches": processor.max_patches,
            },
        )

    @classmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        """The tokens of 12 tiles, which is the library's limit, and of the thumbnail."""
        return 13 * int(config.image_seq_length)

    @property
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    def image_text(self, visual: VisualTokens) -> str:
        """One run of placeholders for all views of an image, the thumbnail last."""
        return f"<img>{self.visual_token * visual.grid.num_tokens}</img>"

    def encode(self, images: Sequence[Image.Image]) -> list[VisualTokens]:
        if not images:
            return []
        pixels = self.image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        features = self.model.model.get_image_features(
            pixels["pixel_values"].to(self.device), return_dict=True
        ).pooler_output
        per_image = features.split([int(n) for n in pixels["num_patches"]])  # each (views, tokens, hidden)
        return [self._visual(image, views) for image, views in zip(images, per_image, strict=True)]

    def _visual(self, image: Image.Image, features: torch.Tensor) -> VisualTokens:
        """The features (views, tokens, hidden) of one image, with the rectangle that each view covers."""
        cols, rows = self._tiles(image)
        rects = [Rect(c / cols, r / rows, (c + 1) / cols, (r + 1) / rows) for r in range(rows) for c in range(cols)]
        if len(rects) > 1:
            rects.append(WHOLE_IMAGE)
        side = round(features.shape[1] ** 0.5)
        grid = TokenGrid(tuple(View(rect, side, side) for rect in rects))
        width, height = self._tile
        return VisualTokens(features.flatten(0, 1), grid, resized=(cols * width, rows * height))

    @property
    def _tile(self) -> tuple[int, int]:
        """Width and height of a tile, in pixels."""
        size = self.image_processor.size
        return size["width"], size["height"]

    def _tiles(self, image: Image.Image) -> tuple[int, int]:
        """Number of columns and rows of tiles that the image processor cuts."""
        processor, (width, height) = self.image_processor, self._tile
        if processor.max_patches == 1:
            return 1, 1
        cols, rows = get_optimal_tiled_canvas(
            (image.height, image.width), (height, width), processor.min_patches, processor.max_patches
        )
        return int(cols), int(rows)
