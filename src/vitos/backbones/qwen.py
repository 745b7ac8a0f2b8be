"""What the Qwen-VL families share: smart resize, one visual token per merged patch, M-RoPE.

The image is resized to multiples of patch x merge pixels within a pixel budget. This changes the aspect ratio a
little, but not the place of a box in fractions of the image. Positions have three axes (time, row, column), and text
continues after an image at the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_window_index

from vitos.backbones.attention import Attention, observe_attention
from vitos.backbones.base import Backbone, VisionGeometry
from vitos.core.geometry import TokenGrid
from vitos.core.prompt import PromptBatch, VisualTokens


class QwenVL(Backbone):
    """Base of the Qwen-VL families: a family adds its capabilities and, if it has any, its extra streams."""

    @property
    def geometry(self) -> VisionGeometry:
        processor, size = self.image_processor, self.image_processor.size
        return VisionGeometry(
            patch_size=processor.patch_size,
            merge_size=processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )

    @classmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        vision = config.vision_config
        # The published checkpoints allow 16384 tokens: 12845056 pixels in cells of 28 x 28, 16777216 of 32 x 32.
        return max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2 if max_pixels else 16384

    @property
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        return [self.model.model.visual]

    def encode(self, images: Sequence[Image.Image]) -> list[VisualTokens]:
        if not images:
            return []
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        return self._visual(pixels["pixel_values"], pixels["image_grid_thw"])

    def layout(self, image: Image.Image) -> tuple[TokenGrid, tuple[int, int]]:
        geometry = self.geometry
        height, width = smart_resize(
            image.height,
            image.width,
            factor=geometry.patch_size * geometry.merge_size,
            min_pixels=geometry.min_pixels,
            max_pixels=geometry.max_pixels,
        )
        side = geometry.patch_size * geometry.merge_size
        return TokenGrid.single(height // side, width // side), (width, height)

    def encode_reduced(self, image: Image.Image) -> VisualTokens:
        (view,) = self.layout(image)[0].views
        rows, cols = max(1, view.rows // 2), max(1, view.cols // 2)
        if 1 in (view.rows, view.cols):  # a single row or column of cells is cut to a quarter of its length
            rows, cols = (max(1, n // 4) if n > 1 else 1 for n in (view.rows, view.cols))
        side = self.geometry.patch_size * self.geometry.merge_size
        small = image.resize((cols * side, rows * side), self.image_processor.resample)
        pixels = self.image_processor(images=[small], do_resize=False, return_tensors="pt")
        return self._visual(pixels["pixel_values"], pixels["image_grid_thw"])[0]

    def encode_cells(self, image: Image.Image, rectangles: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, ...]:
        pixels = self.image_processor(images=[image], return_tensors="pt")
        merge = self.geometry.merge_size
        ((_, rows, cols),) = (pixels["image_grid_thw"] // torch.tensor([1, merge, merge])).tolist()
        # The processor puts the patches of one visual token next to each other: (rows, cols, merge * merge, pixels).
        patches = pixels["pixel_values"].unflatten(0, (rows, cols, merge**2))
        parts = [patches[top:bottom, left:right].flatten(0, 2) for top, left, bottom, right in rectangles]
        grids = [(1, (bottom - top) * merge, (right - left) * merge) for top, left, bottom, right in rectangles]
        found = self._visual(torch.cat(parts), torch.tensor(grids))
        return tuple(torch.cat(stream) for stream in zip(*(visual.tensors for visual in found), strict=True))

    def _visual(self, pixels: Tensor, grids: Tensor) -> list[VisualTokens]:
        """Visual tokens of images given as patches; `grids` (images, 3) has time, rows and columns of patches."""
        features = self.model.model.get_image_features(pixels.to(self.device), grids.to(self.device), return_dict=True)
        deep = features.deepstack_features if self.capabilities.extra_streams else []
        streams = list(zip(*deep, strict=True)) if deep else [()] * len(grids)
        patch, merge = self.geometry.patch_size, self.geometry.merge_size
        return [
            VisualTokens(tokens, TokenGrid.single(h // merge, w // merge), resized=(w * patch, h * patch), streams=own)
            for tokens, own, (_, h, w) in zip(features.pooler_output, streams, grids.tolist(), strict=True)
        ]

    def encoder_attention(self, image: Image.Image, depth: float = 1.0) -> Attention:
        """Attention in a block that attends over the whole image, mean over the patches that attend.

        The depth counts these blocks only. The encoder has no CLS token. A visual token is made of merge x merge
        patches: its attention is the sum of theirs, its keys are the mean.
        """
        visual, vision = self.model.model.visual, self.model.config.vision_config
        pixels = self.image_processor(images=[image], return_tensors="pt")
        grid = pixels["image_grid_thw"].to(self.device)
        windowed = hasattr(vision, "fullatt_block_indexes")
        whole = sorted(vision.fullatt_block_indexes) if windowed else range(len(visual.blocks))
        block = visual.blocks[whole[math.ceil(depth * len(whole)) - 1]]

        def run() -> None:
            self.model.model.get_image_features(pixels["pixel_values"].to(self.device), grid)

        seen = observe_attention(visual, block.attn, run, query=None).merged(vision.spatial_merge_size**2)
        if windowed:  # the encoder sorts the patches by window; put them back in the order of the image
            order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
            seen = seen.tokens(order.argsort().to(seen.received.device))
        return seen

    def position_ids(self, is_visual: Tensor, visuals: Sequence[VisualTokens]) -> Tensor:
        """Text counts up on all three axes; the tokens of an image are at (0, row, column) from where it starts."""
        parts: list[Tensor] = []
        position = start = 0
        device = is_visual.device
        placeholders = is_visual.nonzero()[:, 0].tolist()
        for visual in visuals:
            first = placeholders[0]
            parts.append(torch.arange(first - start, device=device).expand(3, -1) + position)
            position += first - start
            (view,) = visual.grid.views
            index = torch.arange(view.num_tokens, device=device)
            parts.append(torch.stack([torch.zeros_like(index), index // view.cols, index % view.cols]) + position)
            position += max(view.rows, view.cols)
            start = first + view.num_tokens
            placeholders = placeholders[view.num_tokens :]
        parts.append(torch.arange(len(is_visual) - start, device=device).expand(3, -1) + position)
        return torch.cat(parts, dim=1)

    def encoder_output(self, batch: PromptBatch) -> Any:
        """The batch's visual tokens in the form in which the model's own encoder returns them."""
        features: Any = (batch.embeddings,)  # (V, hidden): the model joins one tensor per image, and here is just one
        return BaseModelOutputWithPooling(pooler_output=features)
