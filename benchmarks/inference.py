"""What each plan costs, stage by stage: `python -m benchmarks infer`.

Evidence is given (a square in the image's middle) and nothing ends early, so that all plans read and write texts of
the same length. A plan that writes no boxes chooses as many tokens around the middle by an evidence head behind a
quarter of the layers, which computes its scores and is then told where to look. Each image is asked about once: only
gather shares a prefix, between its own two branches. A run measures every plan in turn, starting with another one each
time, and ratios are taken within a run: what slows the machine down for a while slows both sides down.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from scripts.nano_model import NANO_SPEC
from torch import Tensor

from benchmarks.inference_models import build_model
from benchmarks.peak import peak_memory
from vitos import __version__
from vitos.backbones.base import Backbone
from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.geometry import Box
from vitos.core.stopwatch import Stopwatch
from vitos.policy.plans import Limits, Outcome, Plan, get_plan
from vitos.policy.run import complete, start
from vitos.policy.spec import HeadRule, VitosSpec
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

QUESTION = "<image>What is in the upper left quadrant?\nA. cyst\nB. mass"  # one token a word, for nano's tokenizer
STAGES = ("vision", "prefill 1", "decode 1", "sparsify", "prefill 2", "decode 2")
_STAGE_OF = {
    "vision": "vision",
    "prefix": "prefill 1",
    "early_prefill": "prefill 1",
    "localize_prefill": "prefill 1",
    "localize_decode": "decode 1",
    "sparsify": "sparsify",
    "reason_prefill": "prefill 2",
    "reason_decode": "decode 2",
}
LOOKS = ("vision", "prefill 1", "prefill 2")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model, parts, dtype, device: as in `build_model`.
        plans: "dense", which the others are compared with, is always among them.
        sizes: width and height of the images in pixels.
        kept: shares of the visual tokens that the evidence covers, 0..1.
        early: share of the layers before the evidence head, 0..1.
        batches: questions answered together, each about an image of its own.
        runs: timed runs; one more before them warms up and measures memory.
        evidence_tokens, reasoning_tokens: written by the two branches.
    """

    model: str = "nano"
    parts: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    plans: tuple[str, ...] = ("dense", "two_pass", "gather", "coarse", "crop", "one_pass", "glance")
    sizes: tuple[int, ...] = (512, 1024)
    kept: tuple[float, ...] = (0.25,)
    batches: tuple[int, ...] = (1,)
    runs: int = 5
    evidence_tokens: int = 16
    reasoning_tokens: int = 64
    early: float = 0.25

    @property
    def names(self) -> tuple[str, ...]:
        """The plans, dense first."""
        return ("dense", *(name for name in self.plans if name != "dense"))

    def __post_init__(self) -> None:
        for name in self.plans:
            get_plan(name)
        if not all(0 < share <= 1 for share in self.kept) or self.runs < 1:
            raise ValueError(f"kept shares must lie in (0, 1] and runs be >= 1, got {self.kept} and {self.runs}")


def answer_told(
    vlm: SparseVLM, plan: Plan, queries: Sequence[Query], box: Box, limits: Limits, watch: Stopwatch
) -> list[Outcome]:
    """Follow a plan; the model localizes as ever, and its text is then replaced by one that names `box`."""
    text = f"<evidence>{[list(box.as_tuple())]}</evidence>"
    steps = start(plan, vlm.branches, vlm.engine, queries, limits, watch)
    try:
        request = next(steps)
        while True:
            completions = complete(vlm.engine, request, watch)
            if request.branch == "localize":
                completions = [replace(completion, text=text) for completion in completions]
            request = steps.send(completions)
    except StopIteration as end:
        outcomes: list[Outcome] = end.value
        return outcomes


def middle(grid_side: int, share: float) -> Box:
    """The square of whole cells in the middle of a square grid whose share of the cells is nearest to `share`."""
    side = max(1, round(grid_side * math.sqrt(share)))
    first = (grid_side - side) // 2
    # A hair inside, so that rounding keeps no cell beside it.
    low, high = (first + 0.01) / grid_side, (first + side - 0.01) / grid_side
    return Box(round(low, 6), round(low, 6), round(high, 6), round(high, 6))


def run_benchmark(settings: Settings, progress: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Measure all plans for every size, kept share and batch; see `summarize` for the figures."""
    device = torch.device(settings.device)
    backbone, said = build_model(settings.model, settings.parts, getattr(torch, settings.dtype), device)
    spec = with_told_head(backbone, settings.early)
    return {
        "model": settings.model,
        "said": said,
        "dtype": settings.dtype,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vitos": __version__,
        "runs": settings.runs,
        "early_layers": spec.evidence_head.after if spec.evidence_head else 0,
        "evidence_tokens": settings.evidence_tokens,
        "reasoning_tokens": settings.reasoning_tokens,
        "plans": list(settings.names),
        "cases": list(measure_cases(backbone, spec, settings, progress)),
    }


def measure_cases(
    backbone: Backbone, spec: VitosSpec, settings: Settings, progress: Callable[[str], object] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """All plans for one size, kept share and batch after the other."""
    backbone.stop_token_ids = ()  # texts of fixed length
    names = settings.names
    for size in settings.sizes:
        pictures = [noise(size, seed) for seed in range(max(settings.batches))]
        (view,) = backbone.layout(pictures[0])[0].views
        for share in settings.kept:
            vlm, box = SparseVLM(backbone, spec), middle(view.cols, share)
            for batch in settings.batches:
                label = f"{size} px, {share:.0%} kept, batch {batch}"
                progress(f"{label}: warming up")
                peaks = {name: _peak_bytes(vlm, name, pictures[:batch], box, settings) for name in names}
                runs: list[dict[str, dict[str, Any]]] = []
                for number in range(settings.runs):
                    progress(f"{label}: run {number + 1} of {settings.runs}")
                    turn = number % len(names)
                    order = names[turn:] + names[:turn]
                    runs.append({name: _measure(vlm, name, pictures[:batch], box, settings) for name in order})
                dense = [run["dense"] for run in runs]
                figures: dict[str, dict[str, Any]] = {}
                for name in names:
                    own = [run[name] for run in runs]
                    figures[name] = summarize(own) | compare(own, dense) | {"peak_bytes": peaks[name]}
                yield {"size": size, "kept": share, "batch": batch, "tokens": view.rows * view.cols, **figures}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one plan's runs: seconds by stage, of both looks and in all; tokens; KV bytes."""
    return {
        "seconds": {stage: median(run["seconds"][stage] for run in runs) for stage in STAGES},
        "looks": median(run["looks"] for run in runs),
        "total": median(run["total"] for run in runs),
        "tokens": runs[0]["tokens"],
        "kept": runs[0]["kept"],
        "fallback": runs[0]["fallback"],
        "kv_bytes": runs[0]["kv_bytes"],
        "prefix_bytes": runs[0]["prefix_bytes"],
    }


def compare(runs: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A plan's time beside the dense one's of the same run, as median, least and greatest ratio; its KV beside theirs.

    `looks` is vision and both prefills: what it takes to see; `total` is everything; `language` is `total` without
    vision.
    """
    ratios = {
        f"{key}_ratio": [ours[key] / theirs[key] for ours, theirs in zip(runs, dense, strict=True)]
        for key in ("looks", "language", "total")
    }
    spread = {name: [median(values), min(values), max(values)] for name, values in ratios.items()}
    return {**spread, "kv_ratio": runs[0]["kv_bytes"] / dense[0]["kv_bytes"]}


def _peak_bytes(vlm: SparseVLM, name: str, pictures: Sequence[Image.Image], box: Box, settings: Settings) -> int:
    """Peak memory of one plan; never in a run whose time counts, which this slows down."""
    with peak_memory(vlm.backbone.device) as found:
        _measure(vlm, name, pictures, box, settings)
    return found[0]


@torch.no_grad()
def _measure(
    vlm: SparseVLM, name: str, pictures: Sequence[Image.Image], box: Box, settings: Settings
) -> dict[str, Any]:
    """One plan, once, from pixels to answers."""
    plan, watch = get_plan(name), Stopwatch()
    limits = Limits(max_tokens=settings.reasoning_tokens, max_evidence_tokens=settings.evidence_tokens)
    queries = []
    for picture in pictures:
        with watch.span("vision"):
            scan = plan.scan(vlm.branches, [picture])
        watch.count("vision", scan.visuals[0].grid.num_tokens)
        grid = vlm.backbone.layout(picture)[0]
        chosen = not plan.localizes and plan.drops
        queries.append(Query(scan, QUESTION, budget=float(grid.overlapping([box]).mean()) if chosen else None))
    if plan.shares_prefix:  # as it would itself; here to know their size
        queries = vlm.with_prefixes(queries, watch)
    outcomes = answer_told(vlm, plan, queries, box, limits, watch)
    written = {len(outcome.reasoning.completion.token_ids) for outcome in outcomes}
    if written != {settings.reasoning_tokens}:
        raise ValueError(f"reasoning wrote {written} tokens instead of {settings.reasoning_tokens}")
    seconds, tokens = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0)
    for stage, value in watch.seconds.items():
        seconds[_STAGE_OF[stage]] += value
    for stage, count in watch.tokens.items():
        tokens[_STAGE_OF[stage]] += count
    return {
        "seconds": seconds,
        "looks": sum(seconds[stage] for stage in LOOKS),
        "language": sum(seconds.values()) - seconds["vision"],
        "total": sum(seconds.values()),
        "tokens": tokens,
        "kept": float(np.mean([outcome.kept.ratio for outcome in outcomes])),
        "fallback": any(outcome.kept.fallback for outcome in outcomes),
        "kv_bytes": vlm.engine.kv_bytes,
        "prefix_bytes": sum(query.scan.prefix.nbytes for query in queries if query.scan.prefix),
    }


class ToldHead(EvidenceHead):
    """An evidence head that computes its scores and then looks at the middle of a square image."""

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        scores, side = super().forward(tokens, text), math.isqrt(len(tokens))
        away = (torch.arange(side, device=scores.device) - (side - 1) / 2).abs()
        distance = torch.maximum(away[:, None], away[None]).flatten()
        return 0 * scores - distance


def with_told_head(backbone: Backbone, early: float) -> VitosSpec:
    """Give a model an evidence head; the spec that uses it behind that share of the layers."""
    depth = len(backbone.language_model.layers)
    torch.manual_seed(0)
    with torch.device("cpu"):
        head = ToldHead(backbone.model.config.get_text_config().hidden_size)
    backbone.evidence_head = head.to(backbone.device)
    return replace(NANO_SPEC, evidence_head=HeadRule(after=max(1, round(early * depth))))


def noise(size: int, seed: int) -> Image.Image:
    """A square picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def device_name(device: torch.device) -> str:
    """What a table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
