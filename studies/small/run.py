"""The dual stream on real images, from `small`: `python -m studies.small.run [--seeds 3]`, in the repository.

Trains and evaluates `study.yaml` as `studies/nano_real/run.py` does its recipe, with the same tables, curves
and cases, and puts `nano-real` into the same table: its answers without reinforcement learning and, where
`runs/nano-real-SEED` are there, those after it. The test splits are answered once, after all training.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from studies.nano_real.run import ROWS, Case, folder_of, read_cases, study, values

from vitos.eval.seeds import nested_bootstrap

HERE = Path(__file__).parent
NAME, OTHER = "small", "nano-real"
BASE = Path("runs/nano-real-base")  # nano-real on the same test splits, before any reinforcement learning
TEST = [f"../shared/data/{name}/test.json" for name in ("blood_cells", "brain_tumor_mri", "nuclei")]
# Of each model: its column, and the condition in its cases.
ANSWERED = (("dense", "base_dense"), ("own boxes", "untrained_sparse"), ("sparse after the dual stream", "sparse"))


def other_runs(seeds: int) -> list[list[Case]]:
    """Cases of nano-real after reinforcement learning or, where they were not kept, of nano-real as it is."""
    trained = [folder for seed in range(seeds) if (folder := folder_of(seed, OTHER)).joinpath("cases.jsonl").is_file()]
    if trained:
        return [read_cases(folder) for folder in trained]
    if not (BASE / "cases.jsonl").is_file():
        asked = [part for file in TEST for part in ("--data", file)]
        subprocess.run([sys.executable, "-m", "vitos", "eval", OTHER, *asked, "--out", str(BASE)], check=True)
    return [[_as_base(case) for case in read_cases(BASE)]]


def _as_base(case: Case) -> Case:
    """A case of an evaluation alone, its conditions named as a training names those of its base."""
    names = {"dense": "base_dense", "sparse": "untrained_sparse", "localization": "untrained_localization"}
    return {**case, "conditions": {names[k]: v for k, v in case["conditions"].items() if k in names}}


def in_order(run: Sequence[Case], like: Sequence[Case]) -> list[Case]:
    """The cases of a run in the order of another one's.

    Raises:
        ValueError: if they are not about the same questions.
    """
    by_question = {(Path(case["image"]).name, case["question"]): case for case in run}
    asked = [(Path(case["image"]).name, case["question"]) for case in like]
    if set(asked) != set(by_question) or len(asked) != len(run):
        raise ValueError(f"the runs of {NAME} and {OTHER} are about different questions; remove the older ones")
    return [by_question[key] for key in asked]


def beside(runs: Sequence[Sequence[Case]], others: Sequence[Sequence[Case]]) -> str:
    """Accuracies of both models by template and set, and differences of small and nano-real with intervals."""
    others = [in_order(run, runs[0]) for run in others]
    templates = [case["template"] for case in runs[0]]
    groups = {name: (name,) for names in ROWS.values() for name in names} | {f"**{k}**": v for k, v in ROWS.items()}
    groups["**all**"] = tuple(name for names in ROWS.values() for name in names)
    columns = [(f"{model}, {name}", own, c) for model, own in ((NAME, runs), (OTHER, others)) for name, c in ANSWERED]
    lines = ["| template | questions | " + " | ".join(name for name, _, _ in columns) + " |", "| --- " * 8 + "|"]
    for name, members in groups.items():
        chosen = [i for i, template in enumerate(templates) if template in members]
        cells = [values(own, condition, "correct", chosen) for _, own, condition in columns]
        told = ["–" if np.isnan(cell).all() else f"{np.nanmean(cell):.3f}" for cell in cells]
        lines.append(f"| {name} | {len(chosen)} | " + " | ".join(told) + " |")
    lines += ["", f"| {NAME} minus {OTHER} | points | 95 % interval |", "| --- | --- | --- |"]
    every = list(range(len(templates)))
    for name, condition in ANSWERED:
        ours, theirs = (values(own, condition, "correct", every) for own in (runs, others))
        if not np.isnan(theirs).all():
            mean = nested_bootstrap(100 * (ours - theirs.mean(0)))
            lines.append(f"| {name} | {mean.estimate:+.1f} | {mean.low:+.1f} to {mean.high:+.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    study(NAME, seeds, HERE, lambda runs: beside(runs, other_runs(seeds)))


if __name__ == "__main__":
    main()
