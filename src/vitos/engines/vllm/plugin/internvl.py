"""InternVL3 and 3.5 (Hugging Face form) in vLLM: any subset of the tokens of an image's tiles, at 1-D positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitos.engines.vllm.plugin.sparse import SparseInfoMixin, SparseModelMixin, SparseProcessorMixin


def split_tiles(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tiles (views, 3, height, width) of each image."""
    tiles: Tensor = inputs["pixel_values"]
    return list(tiles.split([int(count) for count in inputs["image_num_patches"]]))


class SparseInternVLInfo(SparseInfoMixin, InternS1ProcessingInfo):
    """Processing info of InternVL."""

    def get_hf_processor(self, **options: Any) -> Any:
        """The processor with the model's own number of tokens per tile, which not all checkpoints tell it."""
        processor = super().get_hf_processor(**options)
        processor.image_seq_length = self.get_hf_config().image_seq_length
        return processor


class SparseInternVLProcessor(SparseProcessorMixin, InternS1MultiModalProcessor):
    """Makes the model's inputs from a request."""

    def whole_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        per_tile = int(self.info.get_hf_config().image_seq_length)
        return [len(tiles) * per_tile for tiles in split_tiles(inputs)]

    def contents(self, inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor, ...]]:
        return [(tiles,) for tiles in split_tiles(inputs)]


@MULTIMODAL_REGISTRY.register_processor(
    SparseInternVLProcessor, info=SparseInternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class VitosInternVL(SparseModelMixin, InternS1ForConditionalGeneration):
    """The model. `rope.py` gives its language model three equal axes, so that vLLM asks it for positions."""

    def single_images(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        counts, ids = inputs["image_num_patches"], inputs["image_token_id"]
        return [
            {"pixel_values": tiles, "image_num_patches": counts[i : i + 1], "image_token_id": ids}
            for i, tiles in enumerate(split_tiles(inputs))
        ]
