"""1-D positions with gaps in vLLM: a family with ordinary rotary positions runs as M-RoPE with three equal axes.

vLLM counts the positions of a 1-D model itself, without gaps, but asks an M-RoPE model for them. If all three axes are
equal, M-RoPE is ordinary RoPE, whichever axis a frequency belongs to. The answers are therefore the same, and gaps are
kept.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig


class ThreeAxes(VerifyAndUpdateConfig):
    """Gives the language model of a 1-D family positions on three axes."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Add `mrope_section` to the rotary parameters, before vLLM checks whether the model has any.

        Raises:
            ValueError: for scaled or partial rotary positions, which vLLM's M-RoPE does not support.
        """
        text = model_config.hf_config.get_text_config()
        parameters = dict(text.rope_parameters)
        if parameters.get("rope_type", "default") != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"vLLM's M-RoPE cannot run rotary positions with {parameters}; use the torch engine")
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        text.rope_parameters = parameters | {"mrope_section": [head // 2, 0, 0]}
