"""(a) The invariants of every family on the device, in float32 and bfloat16, against the unmodified library.

The reference is the library in float64 on the CPU. The yardstick is what the library itself loses in the number
format: our way may be off by at most `SLACK` times as much. A control, the same tokens at renumbered positions, must
be off by more, or the case shows nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scripts.gpu import Setting
from tests.backbones.families import FAMILIES
from tests.backbones.family import Family, library_inputs, library_run
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.geometry import Box
from vitos.core.prompt import Prompt, pad_prompts
from vitos.core.sparsify import Fusion, KeepRule, select
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine

TEXT = "Look here: <image> Which quadrant?"
BOXES = [Box(0.1, 0.15, 0.3, 0.4), Box(0.55, 0.5, 0.6, 0.9)]
TOKENS = 8
SLACK = 3.0
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Least allowed error: the library's own may be 0 by luck, since it is one sample of rounding."""


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row per family and number format."""
    for family in FAMILIES[:1] if setting.tiny else FAMILIES:
        exact = family.backbone()
        for dtype in FLOOR:
            yield check_family(family, exact, setting.device, dtype)


@torch.no_grad()
def check_family(family: Family, exact: Backbone, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of the three invariants, ours and the library's, as shares of the logits' deviation."""
    placed = copy.copy(exact)
    placed.model = copy.deepcopy(exact.model).to(device, dtype)
    image, processor = picture(*family.sizes[0]), family.processor()
    inputs = library_inputs(processor, TEXT, [image])
    (visual,) = placed.encode([image])
    mask = torch.from_numpy(select(visual.grid, BOXES, KeepRule()).mask)
    dense = placed.build_prompt(TEXT, [visual])
    sparse = dense.sparse([mask], Fusion("none"))
    keep = torch.ones(len(dense), dtype=torch.bool)
    keep[dense.is_visual.cpu()] = mask

    whole, _ = library_run(exact, inputs)
    scale = float(whole.std())
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {
        "keep all": (forward(placed, dense), library_run(placed, moved(inputs, device, dtype))[0], whole),
        "sparse = masked dense": (
            forward(placed, sparse),
            hidden_run(placed, moved(inputs, device, dtype), keep),
            hidden_run(exact, inputs, keep),
        ),
    }
    ((completion,),) = TorchEngine(placed).sample([sparse], Sampling(TOKENS), [[0]])
    ids = completion.token_ids
    longer = library_inputs(processor, TEXT, [image], ids.tolist())
    longer_keep = torch.cat([keep, torch.ones(len(ids), dtype=torch.bool)])
    ours = completion.logprobs
    theirs, truth = (
        logprobs(hidden_run(backbone, given, longer_keep), ids, exact.banned_token_ids)
        for backbone, given in ((placed, moved(longer, device, dtype)), (exact, longer))
    )
    found["decoding = one forward"] = ours, theirs, truth
    renumbered = forward(placed, dense.sparse([mask], Fusion("none"), renumber=True))
    control = error(renumbered, found["sparse = masked dense"][2], scale)
    return verdict(family.name, dtype, device, found, control, scale)


def verdict(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    found: dict[str, tuple[Tensor, Tensor, Tensor]],
    control: float,
    scale: float,
) -> dict[str, Any]:
    """A row: per invariant our error and the library's, and whether ours is small enough."""
    figures: dict[str, Any] = {}
    limits = []
    for invariant, (ours, theirs, truth) in found.items():
        unit = scale if invariant != "decoding = one forward" else 1.0
        mine, lib = error(ours, truth, unit), error(theirs, truth, unit)
        limit = max(SLACK * lib, FLOOR[dtype])
        figures[invariant] = {"ours": mine, "library": lib, "limit": limit}
        limits.append(mine <= limit)
    told_apart = control > figures["sparse = masked dense"]["limit"]
    case = f"{name}, {str(dtype).removeprefix('torch.')}"
    return {
        "case": case,
        "device": str(device),
        "ok": all(limits) and told_apart,
        "errors": figures,
        "control": control,
        "summary": f"{max(f['ours'] / f['limit'] for f in figures.values()):.2f} of the limit; control {control:.2g}",
    }


def error(found: Tensor, truth: Tensor, scale: float) -> float:
    """Largest difference, as a share of `scale`."""
    return float((found.double().cpu() - truth.double().cpu()).abs().max()) / scale


def forward(backbone: Backbone, prompt: Prompt) -> Tensor:
    """Logits of a prompt's tokens in our way."""
    batch = pad_prompts([prompt], backbone.pad_token_id, "left")
    logits: Tensor = backbone.model(**backbone.model_inputs(batch)).logits[0]
    return logits


def moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The library's inputs on a device, pixels in its number format."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }


def hidden_run(backbone: Backbone, inputs: dict[str, Any], keep: Tensor) -> Tensor:
    """Logits of the unmodified model at its own positions, with the dropped tokens hidden from all others."""
    device = next(backbone.model.parameters()).device
    _, positions = library_run(backbone, inputs)
    positions = positions[:, None] if len(positions) > 1 else positions
    masked = {"attention_mask": keep[None].long().to(device), "position_ids": positions}
    logits, _ = library_run(backbone, inputs | masked)
    return logits[keep.to(device)]


def logprobs(logits: Tensor, ids: Tensor, banned: Sequence[int]) -> Tensor:
    """Log-probabilities of the last `len(ids)` tokens."""
    rows = logits[-len(ids) - 1 : -1].double().cpu()
    rows[:, list(banned)] = float("-inf")
    return rows.log_softmax(-1).gather(-1, ids[:, None].cpu())[:, 0]


def picture(width: int, height: int) -> Image.Image:
    """A picture in which every place looks different."""
    grid = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(grid)
