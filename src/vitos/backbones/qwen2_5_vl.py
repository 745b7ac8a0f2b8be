"""Qwen2.5-VL and models made from it (Lingshu, HuatuoGPT-Vision-7B-Qwen2.5VL): 28 x 28 pixels per visual token.

What sets it apart: it was trained to write boxes in pixels of the *resized* image.
"""

from __future__ import annotations

from vitos.backbones.base import Capabilities, VllmModel
from vitos.backbones.qwen import QwenVL


class Qwen25VL(QwenVL):
    """Backbone of `Qwen2_5_VLForConditionalGeneration`."""

    model_types = ("qwen2_5_vl",)
    capabilities = Capabilities(
        several_images=True, extra_streams=False, native_coordinates="absolute", any_resolution=True
    )
    vllm_model = VllmModel(
        "VitosQwen2_5_VLForConditionalGeneration", "vitos.engines.vllm.plugin.qwen2_5_vl:VitosQwen25VL"
    )
