"""What the Qwen-VL families share in vLLM: patches of all images in one row, cut by their grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def split_patches(inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The patches (P, values) of each image with its grid (3,), in patches."""
    grids = inputs["image_grid_thw"]
    return list(zip(inputs["pixel_values"].split([int(grid.prod()) for grid in grids]), grids, strict=True))


class QwenProcessorMixin:
    """For the multimodal processor of a Qwen-VL family, before `SparseProcessorMixin`."""

    info: Any

    def whole_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        merged = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return [int(grid.prod()) // merged for grid in inputs["image_grid_thw"]]

    def contents(self, inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor, ...]]:
        # The grid belongs to the content: the same patches in another grid are another image.
        return split_patches(inputs)


class QwenModelMixin:
    """For the model of a Qwen-VL family, before `SparseModelMixin`."""

    def single_images(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"pixel_values": patches, "image_grid_thw": grid[None]} for patches, grid in split_patches(inputs)]
