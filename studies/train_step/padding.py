"""What batches of like lengths save: `python studies/train_step/padding.py`; needs `../shared/data`.

Localizations of nano-real (24 train questions, 8 answers each) are scored and differentiated in batches of any lengths
and in those of `TorchEngine.score_batches`, in turn, three times; medians of seconds, on one thread. Three batches of
questions, two sizes of micro-batch. Writes `padding.md` beside this file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from vitos.data.images import load_image
from vitos.data.readers import read_records
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import NARROWEST_SCORED, TorchEngine, chunk_by_tokens
from vitos.policy import Query, SparseVLM
from vitos.prompt import Prompt
from vitos.screen import quiet

SETS = ("blood_cells", "brain_tumor_mri", "nuclei")
QUESTIONS, SIBLINGS = 24, 8


def seconds(
    engine: TorchEngine,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    budget: int,
    narrowest: float,
) -> tuple[float, int]:
    """Time of scoring and backward pass, and the tokens that ran, padding included."""
    sizes = [(1, len(p) + sum(map(len, ids))) for p, ids in zip(prompts, completions, strict=True)]
    started, padded = time.perf_counter(), 0
    for batch in chunk_by_tokens(sizes, budget, narrowest):
        scores = engine.score([prompts[i] for i in batch], [completions[i] for i in batch])
        scores.logprobs.sum().backward()  # type: ignore[no-untyped-call]
        padded += len(batch) * max(sizes[i][1] for i in batch)
    return time.perf_counter() - started, padded


def main() -> None:
    quiet()
    torch.set_num_threads(1)
    policy = SparseVLM.from_pretrained("nano-real")
    for module in policy.backbone.vision_modules:
        module.requires_grad_(False)
    records = [record for name in SETS for record in read_records(Path("../shared/data") / name / "train.json")]
    random.Random(0).shuffle(records)
    lines = [
        "| questions | micro-batch | tokens | padded | padded, like lengths | seconds | seconds, alike | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for first in range(0, 3 * QUESTIONS, QUESTIONS):
        part = records[first : first + QUESTIONS]
        with torch.no_grad():
            scans = policy.encode_many([[load_image(record.image_paths[0])] for record in part])
            queries = [Query(scan, record.question) for scan, record in zip(scans, part, strict=True)]
            prompts = policy.localize_prompts(queries)
            seeds = [[100 * i + k for k in range(SIBLINGS)] for i in range(QUESTIONS)]
            rows = policy.localize(queries, Sampling(256, 1.0), seeds, prompts=prompts)
        completions = [[rollout.completion.token_ids for rollout in row] for row in rows]
        tokens = sum(len(p) + sum(map(len, ids)) for p, ids in zip(prompts, completions, strict=True))
        seconds(policy.engine, prompts, completions, 16_384, NARROWEST_SCORED)  # warm
        for budget in (65_536, 16_384):
            runs = [
                [
                    seconds(policy.engine, prompts, completions, budget, narrowest)
                    for narrowest in (0.0, NARROWEST_SCORED)
                ]
                for _ in range(3)
            ]
            (a, padded), (b, alike) = ((median(run[i][0] for run in runs), runs[0][i][1]) for i in (0, 1))
            lines.append(
                f"| {first} to {first + QUESTIONS - 1} | {budget:,} | {tokens:,} | {padded:,} | {alike:,} "
                f"| {a:.1f} | {b:.1f} | {a / b:.1f} |"
            )
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
