"""Qwen3-VL in vLLM: any subset of an image's visual tokens, on all its visual streams. Videos are not pruned.

vLLM's encoder returns the streams of a token side by side, the embedding first, and so do our requests: shape
(N, (1 + streams) · hidden). Without an encoder, as in training, vLLM would take the model for one without streams and
drop them without a word; here it keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitos.engines.vllm.plugin.qwen import QwenModelMixin, QwenProcessorMixin
from vitos.engines.vllm.plugin.sparse import SparseInfoMixin, SparseModelMixin, SparseProcessorMixin


class SparseQwen3VLInfo(SparseInfoMixin, Qwen3VLProcessingInfo):
    """Processing info of Qwen3-VL."""


class SparseQwen3VLProcessor(QwenProcessorMixin, SparseProcessorMixin, Qwen3VLMultiModalProcessor):
    """Makes the model's inputs from a request."""


@MULTIMODAL_REGISTRY.register_processor(
    SparseQwen3VLProcessor, info=SparseQwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VitosQwen3VL(QwenModelMixin, SparseModelMixin, Qwen3VLForConditionalGeneration):
    """The model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        self.use_deepstack = bool(vision.deepstack_visual_indexes)
        self.deepstack_num_level = len(vision.deepstack_visual_indexes)
        self.multiscale_dim = self.visual_dim * self.deepstack_num_level
        tokens, hidden = vllm_config.scheduler_config.max_num_batched_tokens, self.config.text_config.hidden_size
        self.deepstack_input_embeds = [torch.zeros(tokens, hidden) for _ in range(self.deepstack_num_level)]
        self.deepstack_input_embeds_num_tokens = 0

    def streams(self, tokens: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = tokens.split(int(self.visual_dim), dim=-1)
        return parts

    def dense_positions(self, length: int, features: Sequence[Any]) -> Tensor:
        # Of the token ids, only those of videos matter there, so zeros will do.
        family = Qwen3VLForConditionalGeneration.get_mrope_input_positions
        positions: Tensor = family(self, [0] * length, list(features))[0]
        return positions
