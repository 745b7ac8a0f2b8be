"""Rollouts of one update by the torch engine, by vLLM and by TRL's vLLM, in one process and in turn.

    python -m benchmarks.rollout_engines studies/vllm/rollouts.json --runs 5

Needs the `vllm` extra, and `bench` for TRL (without it the row is missing, and the output says why). G localizations
of each question, then K reasonings of each of its G sparse prompts, at the scaled-down shape of Qwen2.5-VL
(`train_shapes.py`), random weights, float32. TRL cannot prune, so its reasonings see the whole image
(`rollout_trl.py`). Counted are tokens written per second, of the clock and of the processor; other programs on the
machine slow the latter down less. On a CPU, vLLM runs without a compiled model.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from benchmarks.train_shapes import SHAPES, question_text, random_image
from vitos.core.prompt import Prompt
from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling, derive_seed
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import VllmEngine
from vitos.engines.vllm.sampler import VllmSampler
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

KEPT = 0.25
VLLM = {"enforce_eager": True, "max_model_len": 2048, "block_size": 32, "kv_cache_memory_bytes": 1 << 28}
BRANCHES = ("localize", "reason")
Write = Callable[[str, int], int]
"""Writes a branch's completions, given the number of the run; the number of tokens."""


def main(
    out: Annotated[Path, typer.Argument(help="File of the results.")],
    shape: Annotated[str, typer.Option(help="A name of SHAPES.")] = "qwen2.5-vl",
    questions: Annotated[int, typer.Option(help="Questions of the update.")] = 2,
    group: Annotated[int, typer.Option(help="G = K.")] = 8,
    tokens: Annotated[int, typer.Option(help="Longest completion.")] = 48,
    runs: Annotated[int, typer.Option(help="Timed runs; one more warms up.")] = 3,
) -> None:
    """Time all engines."""
    torch.manual_seed(0)
    policy = SHAPES[shape].build()
    with tempfile.TemporaryDirectory() as folder:
        paths = [random_image(Path(folder), index, SHAPES[shape].side) for index in range(questions)]
        queries = [Query(policy.encode(path), question_text(index)) for index, path in enumerate(paths)]
        dense = [policy.branches.localize_prompt(query) for query in queries]
        sparse = [_kept(policy.branches.reason_prompt(query), i) for query in queries for i in range(group)]
        prompts = {"localize": dense, "reason": sparse}
        # First of all: vLLM without a vision encoder, as ours, leaves rotary tables without data to models made later.
        images = [Image.open(path).convert("RGB") for path in paths]
        trl = _trl(policy, images, Path(folder), group, tokens)
        sampler = VllmSampler(policy.backbone, "float32", **VLLM)
        engines = {
            "torch": _ours(TorchEngine(policy.backbone), prompts, group, tokens),
            "vllm": _ours(VllmEngine(policy.backbone, sampler), prompts, group, tokens),
        }
        if trl is not None:
            engines["trl"] = trl
        rounds = [{name: _timed(name, write, run) for name, write in engines.items()} for run in range(runs + 1)]
    rows = {name: [timed[name] for timed in rounds[1:]] for name in engines}
    results = {
        "shape": SHAPES[shape].text,
        "questions": questions,
        "group": group,
        "tokens": tokens,
        "prompt_tokens": [len(dense[0]), len(sparse[0])],
        "tokens_per_second": rows,
        "vllm_to": {
            name: {unit: _ratio(rows["vllm"], rows[name], unit) for unit in ("clock", "processor")}
            for name in rows
            if name != "vllm"
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    for name, ratios in results["vllm_to"].items():
        typer.echo(f"vLLM writes {ratios['clock']:.2f} times as many tokens as {name} ({ratios['processor']:.2f})")


def _timed(name: str, write: Write, run: int) -> dict[str, float]:
    """Tokens per second of one run: of both branches by the clock and by the processor, and of each by the clock."""
    rates, total, began, worked = {}, 0, time.perf_counter(), time.process_time()
    for branch in BRANCHES:
        start = time.perf_counter()
        written = write(branch, run)
        rates[branch] = written / (time.perf_counter() - start)
        total += written
    clock, work = time.perf_counter() - began, time.process_time() - worked
    typer.echo(f"{name} {run}: {total} tokens, {work:.1f} s of the processor")
    return {"clock": total / clock, "processor": total / work, **rates}


def _ratio(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], unit: str) -> float:
    return statistics.median(a[unit] / b[unit] for a, b in zip(ours, theirs, strict=True))


def _ours(engine: TorchEngine, prompts: dict[str, list[Prompt]], group: int, tokens: int) -> Write:
    def write(branch: str, run: int) -> int:
        seeds = [[derive_seed(run, p, k) for k in range(group)] for p in range(len(prompts[branch]))]
        done = engine.sample(prompts[branch], Sampling(tokens, 1.0), seeds)
        return sum(len(c.token_ids) for row in done for c in row)

    return write


def _trl(policy: SparseVLM, images: Sequence[Any], folder: Path, group: int, tokens: int) -> Write | None:
    """TRL's rollouts, with whole images in both branches; None without TRL."""
    try:
        from benchmarks.rollout_trl import TrlRollouts
    except ImportError as error:
        typer.echo(f"no row for TRL: {error}")
        return None
    rollouts = TrlRollouts(policy, folder / "checkpoint", tokens, {"dtype": "float32", **VLLM})
    texts = {"localize": policy.spec.localize_text, "reason": policy.spec.reason_text}

    def write(branch: str, run: int) -> int:
        chats = [(texts[branch](question_text(index)), image) for index, image in enumerate(images)]
        return rollouts.write(chats, group if branch == "localize" else group * group)

    return write


def _kept(prompt: Prompt, seed: int) -> Prompt:
    """The prompt with a random quarter of its visual tokens."""
    count = len(prompt.embeddings)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: int(KEPT * count)]
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return prompt.sparse([mask], Fusion("none"))


if __name__ == "__main__":
    typer.run(main)
