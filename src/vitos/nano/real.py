"""`nano-real`: the decoder that ships with the package, combined with a DINOv2-S that the user has or downloads.

The vision encoder's weights (Meta AI, Apache-2.0) are not in the package. Both are combined into one ordinary
checkpoint in the user's cache, which is then used like any other folder.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlavaForConditionalGeneration

from vitos.nano import DECODER_PATH, NANO_REAL
from vitos.nano.cache import cached_folder, source_name

DECODER_FILE = "decoder.safetensors"
VISION_VARIABLE = "VITOS_DINOV2"
VISION_ON_HUB = "facebook/dinov2-small"
TOWER = "model.vision_tower."
PROBE = "vision_probe"
PROBE_SIDE = 56
# Smallest cosine between the encoder's features of a test picture here and in the training of the decoder. Two
# roundings of the same weights agree to 0.999998.
LEAST_ALIKE = 0.999


def nano_real_path() -> Path:
    """The folder of the whole checkpoint, made at the first call.

    DINOv2-S is taken from the folder or hub id in the environment variable VITOS_DINOV2, else from
    `facebook/dinov2-small` on the hub.

    Raises:
        OSError: if it cannot be loaded; the message says what to do.
    """
    source = source_name(os.environ.get(VISION_VARIABLE) or VISION_ON_HUB)
    return cached_folder(
        NANO_REAL, DECODER_PATH, source, lambda folder: _assemble(load_vision(source, NANO_REAL), folder)
    )


def save_decoder(checkpoint: Path, folder: Path) -> None:
    """Write the shipped part of a whole `nano-real` checkpoint: all but the vision encoder, rounded to float16."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "COMPLETE", ".*"))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    weights = {name: t.half() for name, t in model.state_dict().items() if not name.startswith(TOWER)}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file({**weights, PROBE: vision_probe(model.model.vision_tower)}, folder / DECODER_FILE, {"format": "pt"})


@torch.no_grad()
def vision_probe(tower: torch.nn.Module) -> Tensor:
    """An encoder's features of a coloured ramp, (1 + 16, hidden) for patches of 14: a fingerprint of its weights."""
    ramp = torch.linspace(-2, 2, PROBE_SIDE)
    picture = torch.stack(
        [ramp.expand(PROBE_SIDE, -1), ramp[:, None].expand(-1, PROBE_SIDE), ramp.flip(0).outer(ramp)]
    )
    seen: Tensor = tower.eval()(picture[None]).last_hidden_state[0]
    return seen.contiguous()


def load_vision(source: str, name: str) -> torch.nn.Module:
    """DINOv2-S from a folder or hub id, float32, for the model of this name.

    Raises:
        OSError: if it cannot be loaded; the message says what to do.
    """
    try:
        tower: torch.nn.Module = AutoModel.from_pretrained(source, dtype="float32")
    except OSError as error:
        raise OSError(
            f"{name} needs the vision encoder DINOv2-S, which could not be loaded from {source!r}: {error}\n"
            f"With access to the Hugging Face hub it is fetched from {VISION_ON_HUB}; without, set {VISION_VARIABLE} "
            "to a folder with it (config.json and model.safetensors of a Dinov2Model)."
        ) from error
    return tower


def warn_unless_alike(expected: Tensor, seen: Tensor, least: float, part: str, model: str) -> None:
    """Warn if a part's outputs for a test input have a cosine below `least` with those in the training of `model`."""
    alike = torch.nn.functional.cosine_similarity(expected, seen, dim=-1).min() if expected.shape == seen.shape else 0
    if alike < least:
        warnings.warn(
            f"this {part} is not the one that {model} was trained with (cosine {float(alike):.4f} on a test input): "
            "the published figures do not hold for this combination",
            stacklevel=3,
        )


def _assemble(tower: torch.nn.Module, folder: Path) -> None:
    """Fill a folder with the whole checkpoint."""
    weights = {name: t.float() for name, t in load_file(DECODER_PATH / DECODER_FILE).items()}
    warn_unless_alike(weights.pop(PROBE), vision_probe(tower), LEAST_ALIKE, "vision encoder", NANO_REAL)
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(DECODER_PATH))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith(TOWER) and name != "lm_head.weight"]
    if missing or unknown:
        raise OSError(f"{DECODER_PATH / DECODER_FILE} is damaged: missing {missing}, unknown {unknown}")
    shutil.copytree(DECODER_PATH, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
