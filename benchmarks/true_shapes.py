"""What sparse prompts save in a language model of true size: `python -m benchmarks shapes`.

Layers of the published models' shapes with random weights, as few as are asked for, since all layers of a decoder
cost the same. The vocabulary is cut to `VOCABULARY`, because prefill computes one token's logits only; the vision
encoder is left out, because both passes share its output. The way of a prompt is the package's own: `select` on a box,
fusion and positions by `Prompt.sparse`, `TorchEngine`'s prefill.

Every round runs the dense prompt and then each sparse one; ratios are of one round, and their median is reported, so
that a machine that slows down for a while slows both. The **arithmetic ideal** of a ratio is that of the operations of
a causal prefill over T tokens through L layers of P weights, with q = heads x head_dim:

    f(T) = L · (2 · P · T + 2 · q · T · (T + 1))        ideal = f(kept + text) / f(all + text)

(2 for each weight and token; a query meets (T + 1) / 2 keys on average, twice, at 2 operations for each entry.)
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from benchmarks.models import random_backbone
from benchmarks.peak import peak_memory
from benchmarks.tables import pipe_table
from vitos.backbones import Backbone
from vitos.core.geometry import Box, TokenGrid
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.sparsify import Kept, select
from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.doctor.shapes import KNOWN, ModelShape, model_shape
from vitos.engines.prefix import cache_bytes
from vitos.engines.torch_engine import TorchEngine

MODELS = ("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct", "HuatuoGPT-Vision-7B-hf")
VOCABULARY = 2048
IMAGE_TOKEN = 7
BEFORE = 30  # text tokens in front of the image
RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True, slots=True)
class ShapesSettings:
    """What is measured; results of other settings are not mixed with these.

    Attributes:
        pixels: sides of square images; a model that makes one size of all images is measured once.
        keeps: shares of the visual tokens below 1; dense is always measured.
        layers: of the language model.
        text_tokens: of the prompt besides its image.
    """

    pixels: tuple[int, ...] = (512, 1024, 1536)
    keeps: tuple[float, ...] = (0.77, 0.5, 0.25, 0.1)
    layers: int = 2
    dtype: str = "float32"
    rounds: int = 3
    text_tokens: int = 150


def run_shapes(
    out: Path,
    plan: ShapesSettings = ShapesSettings(),
    models: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure what `out` lacks, writing `results.json` after every image size and `table.md` at the end.

    Args:
        models: name → configuration; by default `MODELS`.

    Raises:
        ValueError: if `out` holds results of another plan or machine.
    """
    models = models or {name: KNOWN[name] for name in MODELS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan).items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    file = out / RESULTS
    results: dict[str, Any] = {"setting": setting, "cases": []}
    if file.is_file():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["setting"] != setting:
            raise ValueError(f"{file} was measured with {results['setting']}; name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    for name, config in models.items():
        sizes = plan.pixels if config["model_type"] != "llava" else (config["vision_config"]["image_size"],)
        missing = [px for px in sizes if not any((c["model"], c["pixels"]) == (name, px) for c in results["cases"])]
        if not missing:
            continue
        progress(f"{name}: making {plan.layers} layers")
        backbone, shape = make_backbone(config, plan, device)
        for px in missing:
            shown = partial(_labelled, progress, f"{name}, {px} px")
            for case in _measure(backbone, shape, px, plan, shown):
                results["cases"].append({"model": name, "pixels": px, **case})
            write_json_atomic(file, results)
        del backbone
    write_text_atomic(out / TABLE, table(results))
    return results


def _labelled(progress: Callable[[str], object], label: str, text: str) -> None:
    progress(f"{label}: {text}")


def make_backbone(config: Mapping[str, Any], plan: ShapesSettings, device: str) -> tuple[Backbone, ModelShape]:
    """A model of the true widths with random weights, few layers, a small vocabulary and hardly any encoder; and the
    shape of the whole model."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    whole = model_shape(AutoConfig.for_model(config["model_type"], **values))
    layers = "depth" if config["model_type"].startswith("qwen") else "num_hidden_layers"
    values["vision_config"] = {**values["vision_config"], layers: 1}
    values["text_config"] = {**values["text_config"], "num_hidden_layers": plan.layers, "vocab_size": VOCABULARY}
    values |= {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
    processor: Any = Qwen2VLImageProcessorPil()
    if config["model_type"] == "llava":
        side = values["vision_config"]["image_size"]
        square = {"height": side, "width": side}
        processor = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=square, do_pad=True)
    backbone = random_backbone(
        {**values, "model_type": config["model_type"]},
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0),
        image_processor=processor,
        dtype=getattr(torch, plan.dtype),
        device=device,
    )
    return backbone, whole


def ideal_ratio(shape: ModelShape, kept: int, everything: int) -> float:
    """f(kept) / f(everything) of the module's docstring; both counts hold the text."""

    def operations(tokens: int) -> float:
        attention = 2.0 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1)
        return 2.0 * shape.active_parameters * tokens + attention

    return operations(kept) / operations(everything)


def _measure(
    backbone: Backbone, shape: ModelShape, px: int, plan: ShapesSettings, progress: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """One row for each share kept, dense first."""
    visual = _visual_tokens(backbone, px)
    dense = make_prompt(backbone, visual, plan.text_tokens)
    boxes = {keep: Box(0.0, 0.0, keep**0.5, keep**0.5) for keep in plan.keeps}
    seconds: dict[float, list[float]] = {keep: [] for keep in (1.0, *plan.keeps)}
    making: dict[float, list[float]] = {keep: [] for keep in plan.keeps}
    prompts = {1.0: dense}
    _prefill(backbone, dense)  # warm
    for number in range(plan.rounds):
        for keep, times in seconds.items():
            progress(f"round {number + 1} of {plan.rounds}, keep {keep:g}")
            if keep in making:
                taken, (prompts[keep], _) = _timed(partial(sparsified, dense, visual.grid, boxes[keep]))
                making[keep].append(taken)
            times.append(_timed(partial(_prefill, backbone, prompts[keep]))[0])
    layers = shape.layers / plan.layers
    memory = {keep: _memory(backbone, prompt) for keep, prompt in prompts.items()}
    for keep, prompt in prompts.items():
        kept = int(prompt.is_visual.sum())
        ratio = statistics.median(a / b for a, b in zip(seconds[keep], seconds[1.0], strict=True))
        cost = statistics.median(making[keep]) if keep in making else 0.0
        ideal = ideal_ratio(shape, len(prompt), len(dense))
        yield {
            "keep": keep,
            "visual_tokens": kept,
            "kept_share": kept / visual.grid.num_tokens,
            "prompt_tokens": len(prompt),
            "layers_of": shape.layers,
            "prefill_seconds": statistics.median(seconds[keep]),
            "prefill_ratio": ratio,
            "ideal_ratio": ideal,
            "over_ideal": ratio / ideal,
            "peak_bytes": memory[keep][0],
            "peak_ratio": memory[keep][0] / memory[1.0][0],
            "kv_bytes": memory[keep][1],
            "kv_ratio": memory[keep][1] / memory[1.0][1],
            "sparsify_seconds": cost,
            "sparsify_of_measured_dense": cost / statistics.median(seconds[1.0]),
            "sparsify_of_whole_dense": cost / (statistics.median(seconds[1.0]) * layers),
        }


def sparsified(dense: Prompt, grid: TokenGrid, box: Box) -> tuple[Prompt, Kept]:
    """All that a sparse prompt costs beyond its prefill: the keep mask, fusion, ids and positions."""
    selection = select(grid, [box])
    return dense.sparse([torch.from_numpy(selection.mask)]), selection


def make_prompt(backbone: Backbone, visual: VisualTokens, text_tokens: int) -> Prompt:
    """`BEFORE` text tokens, the image, the rest of the text."""
    tokens = visual.grid.num_tokens
    ids = torch.full((text_tokens + tokens,), 3, device=backbone.device)
    ids[BEFORE : BEFORE + tokens] = IMAGE_TOKEN
    positions = backbone.position_ids(ids == IMAGE_TOKEN, [visual])
    return Prompt(
        input_ids=ids,
        position_ids=positions,
        is_visual=ids == IMAGE_TOKEN,
        embeddings=visual.embeddings,
        next_position=int(positions.max()) + 1,
    )


def _visual_tokens(backbone: Backbone, px: int) -> VisualTokens:
    """Random embeddings on the grid that the family gives a square image of `px` pixels."""
    config = backbone.model.config
    if config.model_type == "llava":
        side, resized = config.vision_config.image_size // config.vision_config.patch_size, px
    else:
        cell = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        resized = smart_resize(px, px, factor=cell, min_pixels=cell**2, max_pixels=16384 * cell**2)[0]
        side = resized // cell
    generator = torch.Generator().manual_seed(1)
    embeddings: Tensor = torch.randn(side * side, config.get_text_config().hidden_size, generator=generator)
    placed = embeddings.to(backbone.device, backbone.model.dtype)
    return VisualTokens(placed, TokenGrid.single(side, side), resized=(resized, resized))


@torch.no_grad()
def _prefill(backbone: Backbone, prompt: Prompt) -> Any:
    return TorchEngine(backbone).prefill([prompt], [None]).cache


def _memory(backbone: Backbone, prompt: Prompt) -> tuple[int, int]:
    """Bytes at the peak of a prefill above the weights, and of the KV cache that it leaves."""
    with peak_memory() as peak:
        cache = _prefill(backbone, prompt)
    return peak[0], cache_bytes(cache)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = _now()
    made = work()
    return _now() - started, made


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


COLUMNS = (
    *("model (layers in all)", "image", "visual tokens", "kept", "prefill, s", "prefill", "ideal", "prefill ÷ ideal"),
    *("peak memory", "KV", "sparsification"),
)


def _cells(case: Mapping[str, Any]) -> list[str]:
    ratios = ("prefill_seconds", "prefill_ratio", "ideal_ratio", "over_ideal", "peak_ratio", "kv_ratio")
    return [
        f"{case['model']} ({case['layers_of']})",
        f"{case['pixels']} px",
        str(case["visual_tokens"]),
        f"{case['kept_share']:.0%}",
        *(f"{case[name]:.3f}" for name in ratios),
        f"{case['sparsify_of_whole_dense']:.2%}",
    ]


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown, with what they were measured on."""
    setting, cases = results["setting"], results["cases"]
    lines = [
        "# True shapes",
        "",
        f"Written by `python -m benchmarks shapes` on {setting['device']}, PyTorch {setting['torch']}, "
        f"{setting['dtype']}: "
        f"{setting['layers']} layers of each model with random weights, {setting['text_tokens']} text tokens, medians "
        f"of {setting['rounds']} paired rounds. Ratios are to the dense prompt. The ideal counts operations "
        "(`benchmarks/true_shapes.py:ideal_ratio`). Sparsification is selection, fusion and positions, as a share of "
        "the dense prefill of all layers, which is the measured one times their number.",
        "",
        *pipe_table(COLUMNS, map(_cells, cases), left=2),
    ]
    quarter = [c["over_ideal"] for c in cases if c["keep"] == 0.25]
    sparse = [c["sparsify_of_whole_dense"] for c in cases if c["keep"] < 1]
    if quarter and sparse:
        lines += [
            "",
            f"At 25 % kept the prefill costs at most {max(quarter):.3f} × the ideal (target 1.10); sparsification "
            f"costs at most {max(sparse):.2%} of the dense prefill (target 1 %).",
        ]
    return "\n".join(lines) + "\n"
