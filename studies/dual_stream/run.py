"""Which parts of the dual stream matter, on nano and phantoms: `python studies/dual_stream/run.py [--jobs 2]`.

Three seeds of every variant, the same number of updates each, two processes of one thread. Finished runs are kept in
`runs/study/` and not run again, so the study can be stopped at any time. Writes `results.json`, `table.md` (means and
paired differences) and `figure.svg` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitos.eval.seeds import nested_bootstrap

HERE, RUNS = Path(__file__).parent, Path("runs/study")
VARIANTS: dict[str, list[str]] = {
    "staged": [],
    "reversed": ["train.schedule=reversed"],
    "alternating": ["train.schedule=alternating"],
    "joint": ["train.schedule=joint"],
    "no feedback (λ = 0)": ["rewards.feedback=0"],
    "no IoU reward": ["rewards.iou=0"],
    "fusion none": ["sparsify.fusion=none"],
    "fusion mean": ["sparsify.fusion=mean"],
    "RL without pruning": ["train.schedule=dense"],
    "plan gather": ["sparsify.plan=gather"],
}
# Plan coarse asks for boxes of more than a cell of the reduced image: on 128 px all fall back. One seed of each.
LARGE = {
    f"256 px, {plan}": [
        f"sparsify.plan={plan}",
        "data.train=runs/phantom256/train.json",
        "data.eval=runs/phantom256/test.json",
    ]
    for plan in ("coarse", "two_pass")
}
ALIKE = [variant for variant in VARIANTS if variant not in ("staged", "RL without pruning")]
VARIANTS |= LARGE
COLUMNS = {
    "sparse": "sparse_accuracy",
    "localization": "localization_accuracy",
    "dense": "dense_accuracy",
    "random": "control_random_accuracy",
    "untrained sparse": "control_untrained_sparse_accuracy",
    "base dense": "base_dense_accuracy",
    "IoU": "mean_iou",
    "kept": "kept_ratio",
    "fallback": "fallback_rate",
}


# Differences in points: (variant, its condition in cases.jsonl) against another.
COMPARED = [
    *((("staged", "sparse"), (variant, "sparse")) for variant in ALIKE),
    (("staged", "sparse"), ("RL without pruning", "dense")),
    (("staged", "sparse"), ("RL without pruning", "localization")),
    *(((variant, "sparse"), (variant, "untrained_sparse")) for variant in VARIANTS),
    (("staged", "localization"), ("staged", "base_dense")),
    (("RL without pruning", "localization"), ("RL without pruning", "base_dense")),
    (("RL without pruning", "dense"), ("RL without pruning", "base_dense")),
    *(((variant, "sparse"), (variant, "dense")) for variant in ("staged", "plan gather", *LARGE)),
    (("256 px, two_pass", "sparse"), ("256 px, coarse", "sparse")),
]
STYLE = {"random": ("#999999", "x"), "dense": ("#0072B2", "s"), "sparse": ("#D55E00", "o")}


def run_one(variant: str, seed: int) -> None:
    """Train and evaluate one variant in a process of its own."""
    folder = folder_of(variant, seed)
    if (folder / "results.json").is_file():
        return
    sets = [f"output_dir={folder}", f"name={json.dumps(variant)}", f"seed={seed}", *VARIANTS[variant]]
    command = [sys.executable, "-m", "vitos", "train", str(HERE / "study.yaml"), "--resume"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        full = command + [part for value in sets for part in ("--set", value)]
        subprocess.run(full, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    print(f"done: {variant}, seed {seed}", flush=True)


def seeds_of(variant: str, seeds: int) -> int:
    return min(seeds, 1) if variant in LARGE else seeds


def folder_of(variant: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in variant).strip("-").lower()
    return RUNS / f"{name}-{seed}"


def collect(seeds: int) -> dict[str, Any]:
    """Figures of every finished run by variant, one list entry a seed."""
    out: dict[str, Any] = {}
    for variant in VARIANTS:
        rows = []
        for seed in range(seeds_of(variant, seeds)):
            folder = folder_of(variant, seed)
            if not (folder / "results.json").is_file():
                continue
            results = json.loads((folder / "results.json").read_text())
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            cosines = [row["gradient_cosine"] for row in metrics if row.get("gradient_cosine") is not None]
            row = {name: results[key] for name, key in COLUMNS.items()}
            row["gradient cosine"] = float(np.mean(cosines)) if cosines else None
            rows.append({"seed": seed, **row})
        if rows:
            out[variant] = rows
    return out


def cell(values: list[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ± {np.std(known):.3f}" if known else "–"


def table(results: dict[str, Any]) -> str:
    columns = [*COLUMNS, "gradient cosine"]
    lines = ["| variant | seeds | " + " | ".join(columns) + " |", "| " + "--- | " * (len(columns) + 2)]
    for variant, rows in results.items():
        cells = [cell([row[column] for row in rows]) for column in columns]
        lines.append(f"| {variant} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def right(variant: str, condition: str, seeds: int) -> np.ndarray:
    """1 for a right answer, shape (seeds, questions)."""
    rows = []
    for seed in range(seeds_of(variant, seeds)):
        cases = map(json.loads, (folder_of(variant, seed) / "cases.jsonl").read_text().splitlines())
        by_id = {case["id"]: case["conditions"][condition]["correct"] for case in cases}
        rows.append([by_id[name] for name in sorted(by_id)])
    return np.array(rows, dtype=float)


def differences(seeds: int) -> str:
    """Paired differences in points with 95 % intervals over seeds and questions, and what could have been seen."""
    lines = ["| accuracy of | minus accuracy of | points | 95 % interval | visible |", "| --- " * 5 + "|"]
    for (first, a), (second, b) in COMPARED:
        gained = nested_bootstrap(100 * (right(first, a, seeds) - right(second, b, seeds)))
        told = f"{gained.estimate:+.1f} | {gained.low:+.1f} to {gained.high:+.1f} | {gained.visible:.1f}"
        lines.append(f"| {first}, {a} | {second}, {b} | {told} |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any]) -> Figure:
    """Sparse accuracy of every variant, a dot a seed, beside its own dense and random answers."""
    drawn = Figure(figsize=(8, 0.45 * len(results) + 1.4), layout="constrained")
    axes = drawn.subplots()
    for place, rows in enumerate(results.values()):
        for column, (colour, marker) in STYLE.items():
            values = [row[column] for row in rows if row[column] is not None]
            label = column if place == 0 else None
            axes.scatter(values, [place] * len(values), color=colour, marker=marker, s=26, label=label)
    # Those of the fusion, plan and image size that most variants share.
    base, untrained = (results["staged"][0][name] for name in ("base dense", "untrained sparse"))
    axes.axvline(base, color="#0072B2", linestyle=":", linewidth=1, label="base, dense")
    axes.axvline(untrained, color="#D55E00", linestyle=":", linewidth=1, label="base, sparse")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on the phantom test split")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    # Seed by seed, so that a study stopped early has every variant.
    runs = [(v, seed) for seed in range(args.seeds) for v in VARIANTS if seed < seeds_of(v, args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: run_one(*run), runs))
    results = collect(args.seeds)
    (HERE / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tables = f"{table(results)}\n{differences(args.seeds)}"
    (HERE / "table.md").write_text(tables, encoding="utf-8")
    figure(results).savefig(HERE / "figure.svg")
    print(tables)


if __name__ == "__main__":
    main()
