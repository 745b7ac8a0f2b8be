"""Qwen3-VL, dense and mixture of experts: 32 x 32 pixels a token, interleaved M-RoPE, DeepStack.

What is peculiar: features of earlier vision layers, merged like the last ones, are added to the visual tokens' hidden
states behind the first layers of the language model. These extra streams are pruned with the embeddings' mask, and an
outside token is fused into the same kept token with the same weight on every stream: the embeddings alone decide
which. The family's own grounding skill is in 0..1000 of the image.
"""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vitos.backbones.base import Capabilities
from vitos.backbones.qwen import QwenVL
from vitos.core.prompt import PromptBatch


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration` or `Qwen3VLMoeForConditionalGeneration` behind the package's protocol."""

    capabilities = Capabilities(
        several_images=True, extra_streams=True, native_coordinates="per_mille", any_resolution=True
    )

    def encoder_output(self, batch: PromptBatch) -> Any:
        features: Any = (batch.embeddings,)
        deep: Any = [(stream,) for stream in batch.streams]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=deep)
