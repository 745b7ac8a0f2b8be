"""The dual stream on real images, from nano-real: `python studies/nano_real/run.py [--seeds 3]`.

Trains and evaluates `recipes/nano-real.yaml` once a seed, in `runs/nano-real-SEED`; finished runs are kept. Writes
beside this file `results.json`, `table.md` (per template, means over the seeds, paired differences), `curves.png` and
`cases.jpg`: twenty test questions of seed 0, ten that the sparse branch answers right and ten wrong, in the order of
the SHA-256 of image and question, at most two of a template in each ten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitos.core.geometry import Box, Rect, TokenGrid
from vitos.core.record import parse_options
from vitos.data.images import load_image
from vitos.eval.seeds import nested_bootstrap
from vitos.reports.curves import training_curves
from vitos.reports.overlay import draw_overlay

HERE = Path(__file__).parent
NAME = "nano-real"
CONDITIONS = {
    "base, dense": "base_dense",
    "base, own boxes": "untrained_sparse",
    "localization": "localization",
    "sparse": "sparse",
    "dense": "dense",
    "random": "random",
    "shifted": "shifted",
    "gold boxes": "oracle",
}
COMPARED = [
    ("sparse", "base_dense"),
    ("sparse", "untrained_sparse"),
    ("sparse", "dense"),
    ("sparse", "random"),
    ("sparse", "shifted"),
    ("oracle", "sparse"),
    ("localization", "base_dense"),
]
PLACES = (  # templates that need the place which question or box names (README of the data)
    "tumour_quadrant",
    "tumour_box",
    "wbc_quadrant",
    "cell_type_at_point",
    "point_on_nucleus",
    "platelet_in_window",
)
ROWS = {
    "brain_tumor_mri": ("tumour_box", "tumour_quadrant", "tumour_size", "tumour_type"),
    "blood_cells": ("cell_type_at_point", "platelet_count", "platelet_in_window", "wbc_quadrant"),
    "nuclei": ("densest_quadrant", "largest_nucleus_quadrant", "nuclei_count", "point_on_nucleus"),
}

Case = dict[str, Any]


def folder_of(seed: int, name: str = NAME) -> Path:
    return Path(f"runs/{name}-{seed}")


def recipe_of(name: str) -> str:
    own = Path("studies", name, "study.yaml")
    return str(own) if own.is_file() else f"recipes/{name}.yaml"


def cache_of(name: str) -> str:
    """Where what the frozen encoder says of every image is kept, made once."""
    return f"runs/{name}-cache"


def run_one(seed: int, name: str = NAME) -> None:
    folder = folder_of(seed, name)
    if not (folder / "results.json").is_file():
        sets = (f"seed={seed}", f"output_dir={folder}", f"data.cache={cache_of(name)}")
        command = [sys.executable, "-m", "vitos", "train", recipe_of(name), "--resume"]
        subprocess.run(command + [part for value in sets for part in ("--set", value)], check=True)


def read_cases(folder: Path) -> list[Case]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()]


def values(runs: Sequence[Sequence[Case]], condition: str, key: str, chosen: Sequence[int]) -> np.ndarray:
    """A figure of the chosen questions, shape (seeds, questions); NaN where a condition is not defined."""
    rows = [[run[i]["conditions"].get(condition, {}).get(key) for i in chosen] for run in runs]
    return np.array(rows, dtype=float)


def table(runs: Sequence[Sequence[Case]]) -> str:
    """Accuracy by condition, IoU and kept share for every template, set and all of them."""
    templates = [case["template"] for case in runs[0]]
    lines = ["| template | questions | " + " | ".join(CONDITIONS) + " | IoU, base | IoU | kept | fallback |"]
    lines.append("| --- " * (len(CONDITIONS) + 6) + "|")
    groups = {name: (name,) for names in ROWS.values() for name in names} | {f"**{k}**": v for k, v in ROWS.items()}
    groups["**all**"] = tuple(name for names in ROWS.values() for name in names)
    for name, members in groups.items():
        chosen = [i for i, template in enumerate(templates) if template in members]
        cells = [np.nanmean(values(runs, c, "correct", chosen)) for c in CONDITIONS.values()]
        cells.append(np.nanmean(values(runs, "untrained_localization", "iou", chosen)))
        cells.append(np.nanmean(values(runs, "localization", "iou", chosen)))
        cells += [np.nanmean(values(runs, "sparse", key, chosen)) for key in ("kept_ratio", "fallback")]
        lines.append(f"| {name} | {len(chosen)} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def differences(runs: Sequence[Sequence[Case]]) -> str:
    """Paired differences in points with 95 % intervals over seeds and questions, and what could have been seen."""
    head = ("accuracy of", "minus", "questions", "points", "95 % interval", "visible")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    every = list(range(len(runs[0])))
    needing = [i for i in every if runs[0][i]["template"] in PLACES]
    for name, chosen in (("", every), (", templates that need the place", needing)):
        for a, b in COMPARED:
            gained = 100 * (values(runs, a, "correct", chosen) - values(runs, b, "correct", chosen))
            mean = nested_bootstrap(gained)
            told = f"{mean.estimate:+.1f} | {mean.low:+.1f} to {mean.high:+.1f} | {mean.visible:.1f}"
            lines.append(f"| {a}{name} | {b} | {int((~np.isnan(gained)).any(0).sum())} | {told} |")
    return "\n".join(lines) + "\n"


def by_seed(seeds: Sequence[int], name: str = NAME) -> str:
    keys = (
        "base_dense_accuracy",
        "control_untrained_sparse_accuracy",
        "sparse_accuracy",
        "dense_accuracy",
        "control_random_accuracy",
        "control_shifted_accuracy",
        "control_oracle_accuracy",
        "mean_iou_before",
        "mean_iou",
        "kept_ratio",
        "fallback_rate",
    )
    lines = ["| seed | " + " | ".join(keys) + " |", "| --- " * (len(keys) + 1) + "|"]
    for seed in seeds:
        results = json.loads((folder_of(seed, name) / "results.json").read_text(encoding="utf-8"))
        lines.append(f"| {seed} | " + " | ".join(f"{results[key]:.3f}" for key in keys) + " |")
    return "\n".join(lines) + "\n"


def drawn_cases(cases: Sequence[Case], count: int = 10) -> tuple[list[Case], list[Case]]:
    """Right and wrong ones by the rule above."""

    def place(case: Case) -> str:
        return hashlib.sha256(f"{Path(case['image']).name} {case['question']}".encode()).hexdigest()

    out: tuple[list[Case], list[Case]] = ([], [])
    seen: Counter[tuple[str, bool]] = Counter()
    for case in sorted(cases, key=place):
        right = bool(case["conditions"]["sparse"]["correct"])
        group, key = out[0] if right else out[1], (case["template"], right)
        if len(group) < count and seen[key] < 2:
            seen[key] += 1
            group.append(case)
    return out


def picture(cases: Sequence[Case], folder: Path) -> Figure:
    """Kept tokens bright, own boxes orange, gold boxes blue; the answer given below, and the right one if another."""
    columns = 5
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(3 * columns, 3.5 * rows), layout="constrained")
    for axes, case in zip(figure.subplots(rows, columns).flat, cases, strict=False):
        (view,) = case["grid"]
        grid = TokenGrid.single(view["rows"], view["cols"], Rect(*view["rect"]))
        sparse, own = case["conditions"]["sparse"], case["conditions"]["localization"]["boxes"]
        overlay = draw_overlay(
            load_image(folder / case["image"]),
            grid,
            sparse["kept"],
            [Box(*box) for box in own],
            [Box(*box) for box in case["gold_boxes"]],
        )
        axes.imshow(overlay, aspect="auto" if overlay.width != overlay.height else "equal")
        options = parse_options(case["question"])
        given = options.get(sparse["answer"], "no answer")
        told = f"{given}" if sparse["correct"] else f"{given}; right: {options[case['gold']]}"
        axes.set_title(case["template"], fontsize=9)
        axes.set_xlabel(told, fontsize=8, color="#117733" if sparse["correct"] else "#882255")
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def study(name: str, seeds: int, here: Path, more: Callable[[Sequence[Sequence[Case]]], str] | None = None) -> None:
    """Train and evaluate the recipe of this name once a seed; write tables, curves and cases into `here`.

    Args:
        more: makes a further table from the cases of all seeds.
    """
    subprocess.run(
        [sys.executable, "-m", "vitos", "data", "cache", recipe_of(name), "--out", cache_of(name)], check=True
    )
    for seed in range(seeds):
        run_one(seed, name)
    runs = [read_cases(folder_of(seed, name)) for seed in range(seeds)]
    tables = f"{table(runs)}\n{differences(runs)}\n{by_seed(range(seeds), name)}"
    if more is not None:
        tables += f"\n{more(runs)}"
    (here / "table.md").write_text(tables, encoding="utf-8")
    first = folder_of(0, name)
    (here / "results.json").write_text((first / "results.json").read_text(encoding="utf-8"), encoding="utf-8")
    metrics = [json.loads(line) for line in (first / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training_curves(metrics).savefig(here / "curves.png", dpi=90)
    right, wrong = drawn_cases(runs[0])
    picture([*right, *wrong], first).savefig(here / "cases.jpg", dpi=80, pil_kwargs={"quality": 85})
    print(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    study(NAME, parser.parse_args().seeds, HERE)


if __name__ == "__main__":
    main()
