"""Rollouts of one update by the torch engine and by vLLM, in the same process and in turn; needs the `vllm` extra.

    python -m benchmarks.rollout_engines studies/vllm/rollouts.json --runs 3

G localizations of each question, then K reasonings of each of its G sparse prompts, at the scaled-down shape of
Qwen2.5-VL (`train_shapes.py`), random weights, float32. Counted are tokens written per second, of the clock and of the
processor; other programs on the machine slow the latter down less. On a CPU, vLLM runs without a compiled model.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.train_shapes import SHAPES, question_text, random_image
from vitos.core.prompt import Prompt
from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling, derive_seed
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import VllmEngine
from vitos.engines.vllm.sampler import VllmSampler
from vitos.policy.types import Query

KEPT = 0.25


def main(
    out: Annotated[Path, typer.Argument(help="File of the results.")],
    shape: Annotated[str, typer.Option(help="A name of SHAPES.")] = "qwen2.5-vl",
    questions: Annotated[int, typer.Option(help="Questions of the update.")] = 2,
    group: Annotated[int, typer.Option(help="G = K.")] = 8,
    tokens: Annotated[int, typer.Option(help="Longest completion.")] = 48,
    runs: Annotated[int, typer.Option(help="Timed runs; one more warms up.")] = 3,
) -> None:
    """Time both engines."""
    torch.manual_seed(0)
    policy = SHAPES[shape].build()
    side = SHAPES[shape].side
    with tempfile.TemporaryDirectory() as folder:
        images = [random_image(Path(folder), index, side) for index in range(questions)]
        queries = [Query(policy.encode(image), question_text(index)) for index, image in enumerate(images)]
    dense = [policy.branches.localize_prompt(query) for query in queries]
    sparse = [_kept(policy.branches.reason_prompt(query), i) for query in queries for i in range(group)]
    sampler = VllmSampler(
        policy.backbone,
        "float32",
        enforce_eager=True,
        max_model_len=2048,
        block_size=32,
        kv_cache_memory_bytes=1 << 28,
    )
    engines = {"torch": TorchEngine(policy.backbone), "vllm": VllmEngine(policy.backbone, sampler)}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for run in range(runs + 1):
        for name, engine in engines.items():
            clock, work, written = time.perf_counter(), time.process_time(), 0
            for prompts in (dense, sparse):
                seeds = [[derive_seed(run, p, k) for k in range(group)] for p in range(len(prompts))]
                done = engine.sample(prompts, Sampling(tokens, 1.0), seeds)
                written += sum(len(c.token_ids) for row in done for c in row)
            if run:
                rates[name].append((written / (time.perf_counter() - clock), written / (time.process_time() - work)))
            typer.echo(f"{name} {run}: {written} tokens, {time.process_time() - work:.1f} s of the processor")
    ratios = [[v[i] / t[i] for t, v in zip(rates["torch"], rates["vllm"], strict=True)] for i in (0, 1)]
    results = {
        "shape": SHAPES[shape].text,
        "questions": questions,
        "group": group,
        "tokens": tokens,
        "prompt_tokens": [len(dense[0]), len(sparse[0])],
        "tokens_per_second": {name: [list(pair) for pair in pairs] for name, pairs in rates.items()},
        "ratio_clock": statistics.median(ratios[0]),
        "ratio_processor": statistics.median(ratios[1]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(f"vLLM writes {results['ratio_clock']:.2f} times as many tokens ({results['ratio_processor']:.2f})")


def _kept(prompt: Prompt, seed: int) -> Prompt:
    """The prompt with a random quarter of its visual tokens."""
    count = len(prompt.embeddings)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: int(KEPT * count)]
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return prompt.sparse([mask], Fusion("none"))


if __name__ == "__main__":
    typer.run(main)
