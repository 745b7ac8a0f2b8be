"""A base model whose boxes have something to learn: `python -m studies.claims.base`.

Nano localizes as well as it can from its frozen encoder (IoU 0.79), so stage 1 has nothing to teach it. This base has
a shorter supervised start: the last layer of nano's language model is set back to its untrained values, and the
language model is taught again from gold boxes and answers of the train phantoms, for as few updates as give boxes of
a mean IoU nearest to 0.5 on *validation* phantoms. The lengths are tried from the shortest on, each from the start,
until one is above; no test question is looked at, and no run of the study. Keeps what it has measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from scripts.nano_model import build_nano

from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.policy.vlm import SparseVLM
from vitos.rl.sft import SupervisedConfig, SupervisedTrainer

RUNS = Path("runs/claims")
LENGTHS = (25, 50, 75, 100, 150, 200, 300, 450, 700)
AIM = 0.5


def reset(seed: int = 0) -> SparseVLM:
    """Nano with an untrained last layer."""
    policy, fresh = SparseVLM.from_pretrained("nano", device="cpu"), build_nano(seed=seed)
    layers, untrained = (b.model.model.get_decoder().layers for b in (policy.backbone, fresh))
    layers[-1].load_state_dict(untrained[-1].state_dict())
    return policy


def taught(steps: int, limit: int) -> tuple[SparseVLM, float]:
    """The model after a supervised start of this length, and the mean IoU of its greedy boxes on validation data."""
    policy = reset()
    with TemporaryDirectory() as folder:
        config = SupervisedConfig(
            output_dir=folder,
            max_steps=steps,
            batch_size=24,
            learning_rate=1e-3,
            seed=0,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        )
        SupervisedTrainer(policy, config, read_records("runs/phantom/train.json")).train()
    policy.backbone.model.eval()
    records = read_records("runs/phantom/val.json", limit=limit)
    settings = Settings(batch_size=100, max_localization_tokens=96, max_reasoning_tokens=32)
    return policy, summarize(cases_in_memory(policy, records, settings), bootstrap_samples=1)["mean_iou"]


def make(runs: Path = RUNS, lengths: tuple[int, ...] = LENGTHS, limit: int = 200) -> float:
    """Write the base to `runs/base`, unless it is there, and what was measured to `runs/base.json`; its IoU."""
    log = runs / "base.json"
    found: dict[str, float] = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    runs.mkdir(parents=True, exist_ok=True)
    for steps in lengths:
        if found and max(found.values()) >= AIM:
            break
        if str(steps) not in found:
            policy, iou = taught(steps, limit)
            policy.save_pretrained(runs / f"base-{steps}")
            found[str(steps)] = iou
            log.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"{steps} updates: IoU {iou:.3f}", flush=True)
    chosen = min(found, key=lambda steps: abs(found[steps] - AIM))
    link = runs / "base"
    if not link.exists():
        link.symlink_to(f"base-{chosen}", target_is_directory=True)
    return found[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(f"IoU of the base: {make(args.out):.3f}")


if __name__ == "__main__":
    main()
