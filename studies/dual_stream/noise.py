"""How much of one update's reasoning gradient is signal: `python studies/dual_stream/noise.py [MODEL]`.

Draws independent batches of training phantoms, takes the reasoning branch's gradient of each, and prints the mean
cosine between two of them: the share of a gradient's square that would come again. It is printed for all tokens, and
for the tokens of a completion that write coordinates and the others apart.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from vitos.config.options import DualStreamOptions
from vitos.core.record import Record
from vitos.data.readers import read_records
from vitos.engines.base import Sampling
from vitos.policy.vlm import SparseVLM
from vitos.rl.batch import BranchBatch, reasoning_batch
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.metrics import stack
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

QUESTIONS = 24
SETTINGS = [(1.0, 1, 16), (1.0, 4, 4), (0.6, 1, 16)]  # temperature, G, K
PARTS = ("all tokens", "coordinates", "the rest")


def sampled(
    policy: SparseVLM, records: list[Record], step: int, temperature: float, groups: tuple[int, int]
) -> tuple[BranchBatch, float]:
    """One update's reasoning rollouts and their accuracy."""
    drawn = RolloutOptions(
        num_localizations=groups[0],
        num_reasonings=groups[1],
        localize=Sampling(96, temperature),
        reason=Sampling(64, temperature),
        seed=0,
    )
    batch = roll_out(policy, records, ScanStore(policy).get(records), step, drawn, RewardWeights())
    options = DualStreamOptions(
        num_localizations=groups[0], num_reasonings=groups[1], advantage_group="evidence", scale_advantages=False
    )
    return reasoning_batch(batch, options), float(stack(batch.groups, "sparse_accuracy").mean())


def gradient(policy: SparseVLM, batch: BranchBatch, temperature: float, part: str) -> Tensor:
    """The loss's gradient, flat, through one part of the tokens."""
    vocabulary = policy.backbone.tokenizer.get_vocab()
    numbers = torch.tensor([vocabulary[f"{i / 100:.2f}"] for i in range(101)])
    policy.backbone.model.zero_grad()
    for chunk in policy.engine.score_batches(batch.prompts, batch.token_ids):
        some = batch.part(chunk)
        scores = policy.engine.score(some.prompts, some.token_ids, temperature)
        old, positive, negative = some.tensors(scores.logprobs)
        mask = scores.mask.clone()
        if part != "all tokens":
            for row, ids in enumerate(ids for siblings in some.token_ids for ids in siblings):
                mask[row, : len(ids)] &= torch.isin(ids, numbers) == (part == "coordinates")
        inputs = LossInputs(
            logprobs=scores.logprobs,
            old_logprobs=old,
            mask=mask,
            positive=positive,
            negative=negative,
            reference_logprobs=None,
            repeats=some.repeats,
        )
        out = policy_loss(
            inputs, clip_low=0.2, clip_high=0.28, kl_beta=0.0, denominator=batch.tokens, importance_cap=None
        )
        out.loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.backbone.model.parameters() if p.grad is not None])


def agreement(gradients: list[Tensor]) -> str:
    """Mean cosine of all pairs, with its standard error over the batches (jackknife); – where there is no gradient."""
    if not all(g.any() for g in gradients):
        return "–"
    unit = torch.stack([g / g.norm() for g in gradients])
    cosines = (unit @ unit.T).numpy()
    count = len(gradients)

    def mean(rows: list[int]) -> float:
        return float(np.mean([cosines[i, j] for i in rows for j in rows if i < j]))

    without = [mean([i for i in range(count) if i != left]) for left in range(count)]
    error = np.sqrt((count - 1) * np.var(without))
    return f"{mean(list(range(count))):+.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--batches", type=int, default=12)
    args = parser.parse_args()
    if args.batches < 3:
        parser.error("three batches or more tell how sure a cosine is")
    policy = SparseVLM.from_pretrained(args.model)
    policy.engine.max_batch_tokens = 65536
    for module in policy.backbone.vision_modules:
        module.requires_grad_(False)
    records = list(read_records("runs/phantom/train.json"))
    print(f"| temperature, G × K | accuracy | evidences that tell | {' | '.join(PARTS)} |\n|{' --- |' * 6}")
    for temperature, *groups in SETTINGS:
        gradients: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        told, right = [], []
        for step in range(args.batches):
            chosen = records[step * QUESTIONS : (step + 1) * QUESTIONS]
            batch, accuracy = sampled(policy, chosen, step, temperature, (groups[0], groups[1]))
            told.append(len(batch.prompts))
            right.append(accuracy)
            for part in PARTS:
                gradients[part].append(gradient(policy, batch, temperature, part))
        figures = " | ".join(agreement(gradients[part]) for part in PARTS)
        print(
            f"| {temperature}, {groups[0]} × {groups[1]} | {np.mean(right):.3f} "
            f"| {np.mean(told):.0f} of {QUESTIONS * groups[0]} | {figures} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
