"""Qwen3-VL, dense and mixture of experts: 32 x 32 pixels per visual token, interleaved M-RoPE, DeepStack.

What sets it apart: features of earlier vision layers, merged in the same way as the last ones, are added to the hidden
states of the visual tokens after the first layers of the language model. These extra streams are pruned by the mask of
the embeddings, and a dropped token is fused into the same kept token with the same weight on every stream. The
embeddings alone decide which token and which weight. The family was trained to write boxes in 0..1000 of the image.
"""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vitos.backbones.base import Capabilities, VllmModel
from vitos.backbones.qwen import QwenVL
from vitos.core.prompt import PromptBatch


class Qwen3VL(QwenVL):
    """Backbone of `Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration`."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    capabilities = Capabilities(
        several_images=True, extra_streams=True, native_coordinates="per_mille", any_resolution=True
    )
    vllm_model = VllmModel(
        "VitosQwen3VLForConditionalGeneration",
        "vitos.engines.vllm.plugin.qwen3_vl:VitosQwen3VL",
        model_types=("qwen3_vl",),
    )

    def encoder_output(self, batch: PromptBatch) -> Any:
        features: Any = (batch.embeddings,)  # (V, hidden)
        deep: Any = [(stream,) for stream in batch.streams]  # each (V, hidden)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=deep)
