"""LLaVA with a CLIP or SigLIP encoder in vLLM: any subset of an image's visual tokens, at their 1-D positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitos.engines.vllm.plugin.sparse import SparseInfoMixin, SparseModelMixin, SparseProcessorMixin


class SparseLlavaInfo(SparseInfoMixin, LlavaProcessingInfo):
    """Processing info of LLaVA."""


class SparseLlavaProcessor(SparseProcessorMixin, LlavaMultiModalProcessor):
    """Makes the model's inputs from a request."""

    def whole_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        return [self.info.get_max_image_tokens()] * len(inputs["pixel_values"])

    def contents(self, inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor, ...]]:
        return [(pixels,) for pixels in inputs["pixel_values"]]


@MULTIMODAL_REGISTRY.register_processor(
    SparseLlavaProcessor, info=SparseLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VitosLlava(SparseModelMixin, LlavaForConditionalGeneration):
    """The model. `rope.py` gives its language model three equal axes, so that vLLM asks it for positions."""

    # transformers 5 names the encoder's weights without `vision_model.`; vLLM 0.32 expects it in the names.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
    )

    def single_images(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        pixels = inputs["pixel_values"]
        return [{"pixel_values": pixels[i : i + 1]} for i in range(len(pixels))]
