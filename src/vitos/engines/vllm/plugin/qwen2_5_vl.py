"""Qwen2.5-VL in vLLM: any subset of an image's visual tokens, at their M-RoPE positions. Videos are not pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitos.engines.vllm.plugin.qwen import QwenModelMixin, QwenProcessorMixin
from vitos.engines.vllm.plugin.sparse import SparseInfoMixin, SparseModelMixin, SparseProcessorMixin


class SparseQwen25VLInfo(SparseInfoMixin, Qwen2_5_VLProcessingInfo):
    """Processing info of Qwen2.5-VL."""


class SparseQwen25VLProcessor(QwenProcessorMixin, SparseProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    """Makes the model's inputs from a request."""


@MULTIMODAL_REGISTRY.register_processor(
    SparseQwen25VLProcessor, info=SparseQwen25VLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VitosQwen25VL(QwenModelMixin, SparseModelMixin, Qwen2_5_VLForConditionalGeneration):
    """The model."""

    def dense_positions(self, length: int, features: Sequence[Any]) -> Tensor:
        # Only the number of token ids matters there, so zeros will do.
        family = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions
        positions: Tensor = family(self, [0] * length, list(features))[0]
        return positions
