"""What a question about a volume holds in memory after localization: `python -m benchmarks volume`.

Three prompts are run and decoded by the same engine: one slice (a 2D question), all slices (what localization sees),
and the kept tokens with the numbers of all slices (what reasoning sees, plan two_pass). Of each: tokens of the prompt,
bytes of its keys and values, and the largest amount of memory that running it takes. Random pixels, given evidence,
random weights: only sizes matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scripts.nano_model import NANO_SPEC

from benchmarks.inference import device_name, middle, noise
from benchmarks.inference_models import build_model
from benchmarks.peak import peak_memory
from benchmarks.tables import pipe_table
from vitos.core.geometry import Box
from vitos.core.numbering import IMAGE_PLACEHOLDER
from vitos.core.prompt import Prompt
from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.engines.base import Sampling
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

JSON_FILE, TABLE = "volume.json", "volume.md"
QUESTION = "What is the finding?\nA. cyst\nB. mass"


@dataclass(frozen=True, kw_only=True)
class VolumeSettings:
    """What is measured.

    Attributes:
        model, parts, dtype, device: as in `build_model`.
        slices: number of slices.
        size: width and height of a slice in pixels.
        evidence: number of slices with a box.
        kept: share of such a slice that its box covers.
        tokens: number of tokens that are written.
    """

    model: str = "nano"
    parts: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    slices: int = 40
    size: int = 256
    evidence: int = 3
    kept: float = 0.1
    tokens: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.evidence <= self.slices or self.tokens < 1 or not 0 < self.kept <= 1:
            raise ValueError("needs 1 <= evidence <= slices, tokens >= 1 and a kept share in (0, 1]")


def run_volume(settings: VolumeSettings, progress: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Measure the three prompts."""
    device = torch.device(settings.device)
    backbone, said = build_model(settings.model, settings.parts, getattr(torch, settings.dtype), device)
    backbone.stop_token_ids = ()  # texts of fixed length
    backbone.model.config.get_text_config().max_position_embeddings = 1 << 17  # nano's 4,096 are few for a volume
    vlm = SparseVLM(backbone, NANO_SPEC)
    scan = vlm.plan.scan(vlm.branches, [noise(settings.size, seed) for seed in range(settings.slices)])
    lead = "".join(f"Slice {number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, settings.slices + 1))
    volume = Query(scan, lead + QUESTION)
    slice_2d = Query(vlm.plan.scan(vlm.branches, [noise(settings.size, 0)]), IMAGE_PLACEHOLDER + QUESTION)
    (view,) = scan.visuals[0].grid.views
    edges = middle(view.cols, settings.kept).as_tuple()
    first = (settings.slices - settings.evidence) // 2
    boxes = [Box(*edges, first + n) for n in range(1, settings.evidence + 1)]
    kept = vlm.branches.keep(volume, boxes)
    prompts = {
        "2D: one slice": vlm.branches.reason_prompt(slice_2d),
        "localize: all slices": vlm.branches.localize_prompt(volume),
        "reason: evidence alone": vlm.plan.prompt(vlm.branches, volume, kept),
    }
    rows = {}
    for name, prompt in prompts.items():
        progress(name)
        rows[name] = measured(vlm, prompt, settings)
    return {
        "settings": asdict(settings),
        "model": said,
        "device": device_name(device),
        "torch": torch.__version__,
        "kept_tokens": kept.count,
        "visual_tokens": volume.grid.num_tokens,
        "kept_ratio": kept.ratio,
        "prompts": rows,
    }


def measured(vlm: SparseVLM, prompt: Prompt, settings: VolumeSettings) -> dict[str, int]:
    """Tokens, visual tokens, bytes of keys and values, and peak bytes of a prompt."""
    with torch.no_grad():
        vlm.engine.sample([prompt], Sampling(1), [[0]])  # loads what the first run loads
        with peak_memory(torch.device(settings.device)) as peak:
            vlm.engine.sample([prompt], Sampling(settings.tokens), [[0]])
    config = vlm.backbone.model.config.get_text_config()
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    per_token = 2 * config.num_hidden_layers * width * next(vlm.backbone.model.parameters()).element_size()
    return {
        "tokens": len(prompt),
        "visual": len(prompt.embeddings),
        "kv_bytes": prompt.cached_length * per_token,
        "peak_bytes": peak[0],
    }


def markdown(results: dict[str, Any]) -> str:
    """The table, with what was measured."""
    settings, rows = results["settings"], results["prompts"]
    one = next(iter(rows.values()))
    cells = [
        [
            name,
            f"{row['tokens']:,}",
            f"{row['visual']:,}",
            *(f"{row[key] / 2**20:.2f} ({row[key] / one[key]:.2f}x)" for key in ("kv_bytes", "peak_bytes")),
        ]
        for name, row in rows.items()
    ]
    lines = [
        f"{settings['slices']} slices of {settings['size']} x {settings['size']} pixels, a box in "
        f"{settings['evidence']} of them: {results['kept_tokens']} of {results['visual_tokens']:,} visual tokens kept "
        f"({results['kept_ratio']:.1%}). Model: {results['model']}; {settings['dtype']}, {results['device']}, PyTorch "
        f"{results['torch']}; {settings['tokens']} tokens written. In brackets: compared with one slice.",
        "",
        *pipe_table(["prompt", "tokens", "visual tokens", "keys and values, MiB", "peak, MiB"], cells),
    ]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], out: Path) -> None:
    """Write the figures and the table into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / JSON_FILE, results)
    write_text_atomic(out / TABLE, markdown(results))
