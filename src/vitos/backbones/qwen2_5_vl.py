"""Qwen2.5-VL and its descendants (Lingshu, HuatuoGPT-Vision-7B-Qwen2.5VL): 28 x 28 pixels a token.

What is peculiar: its own grounding skill is in pixels of the *resized* image.
"""

from __future__ import annotations

from vitos.backbones.base import Capabilities
from vitos.backbones.qwen import QwenVL


class Qwen25VL(QwenVL):
    """`Qwen2_5_VLForConditionalGeneration` behind the package's protocol."""

    capabilities = Capabilities(
        several_images=True, extra_streams=False, native_coordinates="absolute", any_resolution=True
    )
