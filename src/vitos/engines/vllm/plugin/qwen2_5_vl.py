"""Qwen2.5-VL in vLLM with any subset of an image's visual tokens. Videos pass as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitos.engines.vllm.plugin.sparse import SparseInfo, SparseModel, SparseProcessor


class Info(SparseInfo, Qwen2_5_VLProcessingInfo):
    """Processing info."""


class Processor(SparseProcessor, Qwen2_5_VLMultiModalProcessor):
    """From a request to the model's inputs."""

    def whole_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        merged = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return [int(grid.prod()) // merged for grid in inputs["image_grid_thw"]]

    def contents(self, inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor, ...]]:
        grids = inputs["image_grid_thw"]
        # The grid too: one row of patches can be read in several shapes.
        return list(zip(inputs["pixel_values"].split([int(grid.prod()) for grid in grids]), grids, strict=True))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class VitosQwen25VL(SparseModel, Qwen2_5_VLForConditionalGeneration):
    """The model."""

    def single_images(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        grids = inputs["image_grid_thw"]
        patches = inputs["pixel_values"].split([int(grid.prod()) for grid in grids])
        return [{"pixel_values": p, "image_grid_thw": grids[i : i + 1]} for i, p in enumerate(patches)]

    def dense_positions(self, length: int, features: Sequence[Any]) -> Tensor:
        # Only the number of tokens counts there, not which they are.
        family = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions
        positions: Tensor = family(self, [0] * length, list(features))[0]
        return positions
