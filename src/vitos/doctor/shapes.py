"""Sizes of a model that decide memory and time, read from its configuration: no weights, nothing downloaded.

`KNOWN` holds the sizes of published checkpoints, so that a recipe can be estimated on a machine without its
checkpoint. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _qwen(text: Mapping[str, int], vision_intermediate: int = 3420, tied: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"intermediate_size": vision_intermediate, "out_hidden_size": text["hidden_size"]}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": rope, "tie_word_embeddings": tied},
        "vision_config": _QWEN_VISION | vision,
        "tie_word_embeddings": tied,
    }


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


_QWEN_7B = _qwen(_text(3584, 18944, 28, 28, 4, 152064))
_QWEN_32B = _qwen(_text(5120, 27648, 64, 40, 8, 152064), vision_intermediate=3456)
_HUATUO_7B = {
    "model_type": "llava",
    "text_config": {"model_type": "qwen2", **_text(3584, 18944, 28, 28, 4, 152064), "tie_word_embeddings": False},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "image_seq_length": 576,
    "tie_word_embeddings": False,
}

# Keys are the last part of a hub id or folder. Sources: config.json of Qwen/Qwen2.5-VL-*-Instruct, whose sizes Lingshu
# has too, and of FreedomIntelligence/HuatuoGPT-Vision-7B (Qwen2-7B and CLIP ViT-L/14-336). They were copied from
# publications, because the hub could not be reached; the config.json of a local folder comes first.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B-Instruct": _qwen(_text(2048, 11008, 36, 16, 2, 151936), tied=True),
    "Qwen2.5-VL-7B-Instruct": _QWEN_7B,
    "Qwen2.5-VL-32B-Instruct": _QWEN_32B,
    "Lingshu-7B": _QWEN_7B,
    "Lingshu-32B": _QWEN_32B,
    "HuatuoGPT-Vision-7B-hf": _HUATUO_7B,
    "HuatuoGPT-Vision-7B-Qwen2.5VL": _QWEN_7B,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model that decide memory and time. Parameters are counted in numbers, not in bytes.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocab: sizes of the language model.
        intermediate: width of the feed-forward part that a token passes (in a mixture, of the token's experts).
        text_parameters: parameters of language model, embeddings and head, which full training trains.
        vision_parameters: parameters of encoder and merger, which are frozen.
        active_parameters: parameters of the layers that a token passes (in a mixture, with the token's experts only).
        linear_parameters: weights of the linear layers of the language model, without the head.
        layer_parameters: parameters of the largest layer.
        largest_matrix: entries of the language model's largest weight.
        adapted_widths: sum of inputs and outputs of all linear layers of the language model; adapters of rank r have
            r times this number of parameters.
        shares_prompt: whether siblings read one copy of their prompt's keys, which needs full attention in all layers.
        visual_tokens: number of visual tokens of the largest image within the pixel limits.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    text_parameters: int
    vision_parameters: int
    active_parameters: int
    linear_parameters: int
    layer_parameters: int
    largest_matrix: int
    adapted_widths: int
    shares_prompt: bool
    visual_tokens: int


def find_config(path: str) -> Any:
    """The Hugging Face configuration of a folder, of a name in `KNOWN`, or of a hub id in the local hub cache.

    Raises:
        ValueError: for anything else; says what to give.
    """
    from transformers import AutoConfig

    from vitos.policy.locate import config_folder

    name, folder = Path(path).name, config_folder(path)
    if (Path(folder) / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    if name in KNOWN:
        config = {key: value for key, value in KNOWN[name].items() if key != "model_type"}
        return AutoConfig.for_model(KNOWN[name]["model_type"], **config)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except OSError as error:
        known = ", ".join(KNOWN)
        raise ValueError(
            f"{path}: the sizes of this model are not known; download its config.json (hf download {path} "
            f"config.json), give a folder that holds it, or one of {known}"
        ) from error


def model_shape(config: Any, max_pixels: int | None = None) -> ModelShape:
    """Sizes of a configuration, counted on a model that takes no memory (PyTorch's meta device).

    Args:
        config: configuration of a Hugging Face model.
        max_pixels: limit of the resized image, if the family has one; None: the library's.

    Raises:
        ValueError: for a family without a backbone.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from vitos.backbones import family_of
    from vitos.backbones.base import layer_kinds

    family = family_of(config.model_type)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    text, inner = config.get_text_config(), model.model
    own = {id(p): p for p in (*inner.language_model.parameters(), *model.get_output_embeddings().parameters())}
    share = getattr(text, "num_experts_per_tok", None) if getattr(text, "num_experts", None) else None
    active = 0
    for name, weight in inner.language_model.layers.named_parameters():
        asked = share / text.num_experts if share and ".experts." in name else 1.0
        active += round(weight.numel() * asked)
    linears = [m for m in inner.language_model.modules() if isinstance(m, torch.nn.Linear)]
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.moe_intermediate_size * share if share else text.intermediate_size,
        vocab=text.vocab_size,
        text_parameters=sum(p.numel() for p in own.values()),
        vision_parameters=sum(p.numel() for p in model.parameters() if id(p) not in own),
        active_parameters=active,
        linear_parameters=sum(m.weight.numel() for m in linears),
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in inner.language_model.layers),
        largest_matrix=max(p.numel() for p in own.values()),
        adapted_widths=sum(m.in_features + m.out_features for m in linears),
        shares_prompt=layer_kinds(text) == {"full_attention"},
        visual_tokens=family.most_visual_tokens(config, max_pixels),
    )
