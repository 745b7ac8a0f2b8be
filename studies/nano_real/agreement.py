"""Where gradients of the reasoning branch agree between batches: `python studies/nano_real/agreement.py`.

Batches of 48 train questions, 8 answers of each from the tokens of greedy boxes, rewarded when right, advantages
against the question's mean, before any update. Prints for every part of the decoder the mean cosine between the
gradients of two batches and the mean norm, and writes them to `agreement.md` beside this file.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from vitos.cli.screen import quiet
from vitos.core.record import Record
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import load_image
from vitos.data.readers import read_records
from vitos.engines.base import Sampling
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

HERE = Path(__file__).parent
SETS = ("blood_cells", "brain_tumor_mri", "nuclei")
LONGEST = {"localize": 256, "reason": 32}


def gradient(policy: SparseVLM, records: Sequence[Record], siblings: int, seed: int) -> dict[str, Tensor]:
    """By part of the decoder: the gradient of the batch's expected reward, flat."""
    with torch.no_grad():
        scans = policy.branches.encode_many([[load_image(record.image_paths[0])] for record in records])
        queries = [Query(scan, record.question) for scan, record in zip(scans, records, strict=True)]
        located = [row[0].response for row in policy.localize(queries, Sampling(LONGEST["localize"], 0.0))]
        prompts = [
            policy.plan.reason(policy.branches, query, [found.boxes], Stopwatch())[0].prompt
            for query, found in zip(queries, located, strict=True)
        ]
        seeds = [[seed + siblings * i + k for k in range(siblings)] for i in range(len(queries))]
        rows = policy.reason(queries, prompts, Sampling(LONGEST["reason"], 1.0), seeds)
    right = torch.tensor([[r.response.answer == q.answer for r in row] for row, q in zip(rows, records, strict=True)])
    advantages = right.float() - right.float().mean(1, keepdim=True)
    completions = [[rollout.completion.token_ids for rollout in row] for row in rows]
    policy.backbone.model.zero_grad()
    for batch in policy.engine.score_batches(prompts, completions):
        scores = policy.engine.score([prompts[i] for i in batch], [completions[i] for i in batch])
        weights = torch.cat([advantages[i] for i in batch])
        (-(weights[:, None] * scores.logprobs).sum() / right.numel()).backward()  # type: ignore[no-untyped-call]
    parts = defaultdict(list)
    for name, weight in policy.backbone.model.named_parameters():
        if weight.grad is not None and "language_model" in name:
            found = re.search(r"layers\.\d+\.(?:self_attn|mlp)", name)
            parts[found[0] if found else "embeddings" if "embed" in name else "norms"].append(weight.grad.flatten())
    return {part: torch.cat(gradients) for part, gradients in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--siblings", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    policy = SparseVLM.from_pretrained("nano-real")
    policy.engine.max_batch_tokens = 8000
    records = [record for name in SETS for record in read_records(args.data / name / "train.json")]
    random.Random(args.seed).shuffle(records)
    places = range(0, args.batches * args.questions, args.questions)
    found = [
        gradient(policy, records[i : i + args.questions], args.siblings, 10_000 * i)
        for i in track(places, "gradients")
    ]
    lines = ["| part of the decoder | weights | cosine between batches | norm |", "| --- | --- | --- | --- |"]
    for part in sorted(found[0]):
        pairs = [torch.cosine_similarity(a[part], b[part], dim=0) for a, b in combinations(found, 2)]
        norm = torch.stack([one[part].norm() for one in found]).mean()
        lines.append(f"| {part} | {found[0][part].numel():,} | {torch.stack(pairs).mean():.3f} | {norm:.3f} |")
    text = "\n".join(lines) + "\n"
    (HERE / "agreement.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
