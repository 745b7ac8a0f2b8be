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

from vitos.cli.screen import quiet
from vitos.core.prompt import Prompt
from vitos.data.images import load_image
from vitos.data.readers import read_records
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import NARROWEST_SCORED, TorchEngine, chunk_by_tokens
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

SETS = ("blood_cells", "brain_tumor_mri", "nuclei")
QUESTIONS, SIBLINGS = 24, 8


def seconds(
    engine: TorchEngine,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    batches: Sequence[list[int]],
) -> float:
    """Time of scoring and backward pass."""
    started = time.perf_counter()
    for batch in batches:
        scores = engine.score([prompts[i] for i in batch], [completions[i] for i in batch])
        scores.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


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
            scans = policy.branches.encode_many([[load_image(record.image_paths[0])] for record in part])
            queries = [Query(scan, record.question) for scan, record in zip(scans, part, strict=True)]
            prompts = [policy.branches.localize_prompt(query) for query in queries]
            seeds = [[100 * i + k for k in range(SIBLINGS)] for i in range(QUESTIONS)]
            rows = policy.localize(queries, Sampling(256, 1.0), seeds, prompts=prompts)
        completions = [[rollout.completion.token_ids for rollout in row] for row in rows]
        lengths = [len(p) + sum(map(len, ids)) for p, ids in zip(prompts, completions, strict=True)]
        for budget in (65_536, 16_384):
            ways = [
                list(chunk_by_tokens([(1, length) for length in lengths], budget, narrowest))
                for narrowest in (0.0, NARROWEST_SCORED)
            ]
            seconds(policy.engine, prompts, completions, ways[1])  # warm
            runs = [[seconds(policy.engine, prompts, completions, batches) for batches in ways] for _ in range(3)]
            a, b = (median(run[i] for run in runs) for i in (0, 1))
            padded, alike = (sum(len(batch) * max(lengths[i] for i in batch) for batch in way) for way in ways)
            lines.append(
                f"| {first} to {first + QUESTIONS - 1} | {budget:,} | {sum(lengths):,} | {padded:,} | {alike:,} "
                f"| {a:.1f} | {b:.1f} | {a / b:.1f} |"
            )
            print(lines[-1], flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
