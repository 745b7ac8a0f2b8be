"""The paper's claims from a base whose boxes can improve: `python -m studies.claims.run [--jobs 2]`.

First the base (`base.py`: IoU about 0.5, chosen on validation phantoms), then seven variants x five seeds of the same
number of updates (`study.yaml`), seed by seed, so that a study stopped early has every variant. Whatever is finished
in `runs/claims/` is kept: the same command goes on. Writes `claims.md` and `results.json` in this folder: each claim
with its difference, an interval over seeds and questions, what the study could have seen, and a verdict that was
fixed before the first run:

    holds       the interval lies above zero
    fails       it lies below half a point: an effect worth naming would have been seen
    undecided   anything else

`--smoke` runs one seed with two updates a stage and twenty questions in `runs/claims-smoke`, and says how long the
whole study will take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from studies.claims.base import make

from vitos.eval.seeds import SeededInterval, nested_bootstrap

HERE = Path(__file__).parent
VARIANTS: dict[str, list[str]] = {
    "staged": [],
    "reversed": ["train.schedule=reversed"],
    "joint": ["train.schedule=joint"],
    "alternating": ["train.schedule=alternating"],
    "no feedback": ["rewards.feedback=0"],
    "no IoU": ["rewards.iou=0"],
    "without pruning": ["train.schedule=dense"],
}
WORTH_NAMING = 0.5  # points
SMOKE = [
    "train.localization_steps=2",
    "train.reasoning_steps=2",
    "train.log_gradient_cosine_steps=1",
    "data.limit_eval=20",
]
UPDATES, QUESTIONS = 75, 400  # of study.yaml


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the paper, as (variant, condition, figure) minus another, in points."""

    text: str
    first: tuple[str, str, str]
    second: tuple[str, str, str]


SPARSE = ("staged", "sparse", "correct")
BOXES = ("staged", "localization", "iou")
CLAIMS = (
    Claim("stage 1 improves the boxes (IoU)", BOXES, ("staged", "untrained_localization", "iou")),
    Claim("dual-stream RL improves the sparse answers", SPARSE, ("staged", "untrained_sparse", "correct")),
    Claim("sparse answers beat the base's dense ones", SPARSE, ("staged", "base_dense", "correct")),
    Claim("it beats RL without pruning, localization", SPARSE, ("without pruning", "localization", "correct")),
    Claim("it beats RL without pruning, dense answers", SPARSE, ("without pruning", "dense", "correct")),
    Claim("staged beats reversed", SPARSE, ("reversed", "sparse", "correct")),
    Claim("staged beats joint", SPARSE, ("joint", "sparse", "correct")),
    Claim("staged beats alternating", SPARSE, ("alternating", "sparse", "correct")),
    Claim("cross-feedback helps (against λ = 0)", SPARSE, ("no feedback", "sparse", "correct")),
    Claim("cross-feedback helps the boxes (IoU)", BOXES, ("no feedback", "localization", "iou")),
    Claim("the IoU reward helps", SPARSE, ("no IoU", "sparse", "correct")),
    Claim("the IoU reward helps the boxes (IoU)", BOXES, ("no IoU", "localization", "iou")),
    Claim("which tokens matters (against random)", SPARSE, ("staged", "random", "correct")),
)


# --- running --------------------------------------------------------------------------------------------------------


def folder_of(runs: Path, variant: str, seed: int) -> Path:
    return runs / f"{variant.replace(' ', '-').lower()}-{seed}"


def run_one(runs: Path, variant: str, seed: int, more: Sequence[str]) -> None:
    """Train and evaluate one variant."""
    sets = [f"model.path={runs / 'base'}", f"seed={seed}", *more, *VARIANTS[variant]]
    if train_once(folder_of(runs, variant, seed), str(HERE / "study.yaml"), sets):
        print(f"done: {variant}, seed {seed}", flush=True)


def train_once(folder: Path, recipe: str, sets: Sequence[str]) -> bool:
    """`vitos train` into `folder`, in a process of its own with one thread; False if that was finished before."""
    if (folder / "results.json").is_file():
        return False
    command = [sys.executable, "-m", "vitos", "train", recipe, "--resume"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        full = command + [part for value in (f"output_dir={folder}", *sets) for part in ("--set", value)]
        subprocess.run(full, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return True


def seconds_of(folder: Path) -> tuple[float, float]:
    """Seconds of a run in its updates, and of all the rest, which is mostly its evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = sum(value for row in rows for name, value in row.items() if name.startswith("seconds/"))
    whole = (folder / "results.json").stat().st_mtime - (folder / "recipe.yaml").stat().st_mtime
    return training, max(0.0, whole - training)


# --- what it says ---------------------------------------------------------------------------------------------------


def figures(runs: Path, seeds: Sequence[int], side: tuple[str, str, str]) -> np.ndarray:
    """A figure of every question in points, shape (seeds, questions); nan where it is not defined."""
    variant, condition, key = side
    rows = []
    for seed in seeds:
        lines = (folder_of(runs, variant, seed) / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        cases = sorted(map(json.loads, lines), key=lambda case: case["id"])
        rows.append([case["conditions"].get(condition, {}).get(key) for case in cases])
    return 100 * np.array(rows, dtype=float)


def verdict(found: SeededInterval) -> str:
    if found.low > 0:
        return "holds"
    return "fails" if found.high < WORTH_NAMING else "undecided"


def table(runs: Path, seeds: Sequence[int]) -> tuple[str, list[dict[str, float | str]]]:
    """All claims as Markdown, and as rows."""
    head = ("claim of the paper", "with", "without", "points", "95 % interval", "visible", "verdict")
    lines, rows = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"], []
    for claim in CLAIMS:
        first, second = figures(runs, seeds, claim.first), figures(runs, seeds, claim.second)
        found = nested_bootstrap(first - second)
        with_it, without = float(np.nanmean(first)), float(np.nanmean(second))
        told = f"{found.estimate:+.1f} | {found.low:+.1f} to {found.high:+.1f} | {found.visible:.1f}"
        lines.append(f"| {claim.text} | {with_it:.1f} | {without:.1f} | {told} | {verdict(found)} |")
        row = {"low": found.low, "high": found.high, "visible": found.visible, "verdict": verdict(found)}
        rows.append({"claim": claim.text, "with": with_it, "without": without, "points": found.estimate, **row})
    return "\n".join(lines) + "\n", rows


def cosines(runs: Path, seeds: Sequence[int]) -> str:
    """Mean cosine between the two branches' gradients of each schedule, lowest and highest seed."""
    lines = ["| schedule | cosine of the branches' gradients |", "| --- | --- |"]
    for variant in ("staged", "reversed", "joint", "alternating"):
        means = []
        for seed in seeds:
            text = (folder_of(runs, variant, seed) / "metrics.jsonl").read_text(encoding="utf-8")
            found = [json.loads(line).get("gradient_cosine") for line in text.splitlines()]
            means.append(np.mean([value for value in found if value is not None]))
        lines.append(f"| {variant} | {np.mean(means):.3f} ({min(means):.3f} to {max(means):.3f}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    runs, seeds = Path("runs/claims-smoke" if args.smoke else "runs/claims"), range(1 if args.smoke else args.seeds)
    started = time.time()
    iou = make(runs, (2,), 20) if args.smoke else make(runs)
    base_seconds = time.time() - started
    more = SMOKE if args.smoke else []
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: run_one(runs, *run, more), [(v, s) for s in seeds for v in VARIANTS]))
    text, rows = table(runs, seeds)
    text = f"Base: mean IoU {iou:.3f} on validation phantoms. {len(seeds)} seeds.\n\n{text}\n{cosines(runs, seeds)}"
    print(text)
    if args.smoke:
        spent = [seconds_of(folder_of(runs, variant, 0)) for variant in VARIANTS]
        each = np.mean([UPDATES / 4 * training + QUESTIONS / 20 * rest for training, rest in spent])
        hours = each * len(VARIANTS) * args.seeds / args.jobs / 3600
        print(
            f"The whole study: about {hours:.1f} hours at {args.jobs} jobs, and the base ({base_seconds:.0f} s here)."
        )
        return
    (HERE / "claims.md").write_text(text, encoding="utf-8")
    (HERE / "results.json").write_text(
        json.dumps({"base_iou": iou, "claims": rows}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
