"""The one builder of models with random weights: shapes are a benchmark's, everything else is here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vitos.backbones import family_of
from vitos.backbones.base import Backbone


def random_backbone(
    config: Mapping[str, Any] | Any,
    *,
    tokenizer: Any,
    image_processor: Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generation_config: Any = None,
    seed: int | None = 0,
) -> Backbone:
    """A model of its family's backbone, in evaluation mode.

    Args:
        config: a Hugging Face config, or its values with `model_type`.
        seed: seed of the weights; None draws them from PyTorch's global generator as it is.
    """
    if isinstance(config, Mapping):
        values = {key: value for key, value in config.items() if key != "model_type"}
        config = AutoConfig.for_model(config["model_type"], **values)
    config._attn_implementation = "sdpa"
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device(device):  # billions of random numbers are drawn where they stay
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return family_of(config.model_type)(model.to(device).eval(), tokenizer, image_processor)
