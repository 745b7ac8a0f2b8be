"""Scenes and what the frozen encoder sees in them, made once: `scenes.json` and `features.npy` (N, 256, 768)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from nano_real.scenes import Fact, Pixels, Scene, Source, corners, make_scene, patches
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

COUNTS = {"brain_tumor_mri": 3200, "blood_cells": 2600, "nuclei": 2400}
BATCH = 16
# Hidden states that LLaVA joins. The last one says what a token sees, but hardly where it is, and the first one does
# (`scripts/probe_places.py`); a place that is asked for cannot be looked up without.
LAYERS = (1, -1)
HIDDEN = 384


@torch.no_grad()
def encode(model: torch.nn.Module, pixels: list[Pixels], mean: Tensor, std: Tensor) -> NDArray[np.float16]:
    """What LLaVA takes of the encoder, (n, 256, 768): outputs of layers before the final norm, no class token."""
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    seen = model((x - mean.view(3, 1, 1)) / std.view(3, 1, 1), output_hidden_states=True).hidden_states
    return np.asarray(torch.cat([seen[layer][:, 1:] for layer in LAYERS], dim=-1).half())


def make_features(sources: list[Source], vision: Path, folder: Path, seed: int) -> None:
    """Scenes of the sources that are not held out, in random order of the sets.

    Args:
        vision: DINOv2's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    fit = [source for source in sources if not source.held_out]
    pool = patches(fit)
    order: list[Source] = []
    for name, count in COUNTS.items():
        own = [source for source in fit if source.scene.domain == name]
        order += [own[i % len(own)] for i in range(count)]
    order = [order[i] for i in rng.permutation(len(order))]
    model = AutoModel.from_pretrained(vision, dtype="float32").eval()
    processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    partial = folder / ".features.npy"
    table = np.lib.format.open_memmap(partial, "w+", np.float16, (len(order), 256, HIDDEN * len(LAYERS)))
    scenes: list[Scene] = []
    for start in track(range(0, len(order), BATCH), "encoding scenes"):
        made = [make_scene(source, pool[source.scene.domain], rng) for source in order[start : start + BATCH]]
        table[start : start + len(made)] = encode(model, [pixels for pixels, _ in made], mean, std)
        scenes += [scene for _, scene in made]
    table.flush()
    save_scenes(scenes, folder)
    partial.rename(folder / "features.npy")


def save_scenes(scenes: list[Scene], folder: Path) -> None:
    rows = [{**dataclasses.asdict(scene), "complete": sorted(scene.complete)} for scene in scenes]
    (folder / "scenes.json").write_text(json.dumps(rows), encoding="utf-8")


def load_features(folder: Path) -> tuple[list[Scene], NDArray[np.float16]]:
    """Scenes and features (N, 256, 768) of a folder that `make_features` has filled.

    Raises:
        ValueError: if the features are of other layers.
    """
    features = np.load(folder / "features.npy", mmap_mode="r")
    if features.shape[-1] != HIDDEN * len(LAYERS):
        raise ValueError(f"{folder} holds features of other layers than {LAYERS}; remove it to have them made anew")
    scenes = []
    for row in json.loads((folder / "scenes.json").read_text(encoding="utf-8")):
        findings = tuple((kind, corners(box)) for kind, box in row["findings"])
        facts = tuple(
            Fact(f["template"], corners(f["place"]), corners(f["evidence"]), f["truth"]) for f in row["facts"]
        )
        scenes.append(Scene(row["domain"], findings, frozenset(row["complete"]), facts))
    return scenes, features
