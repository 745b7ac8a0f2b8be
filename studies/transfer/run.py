"""Does the dual stream carry over to images that it was not reinforced on? `python -m studies.transfer.run`.

`recipes/nano-real.yaml`, once for each of its three sets and each seed, on the train splits of the *other two*; then
greedy answers to the test questions of the set left out, of which the run has seen neither a question nor a box. (The
supervised start of nano-real has: it is the reinforcement that is moved to other images here, not the model.)
Beside it stands what `studies/nano_real` reaches, which was reinforced on all three. Nothing is chosen here: settings
are the recipe's.

Finished runs in `runs/transfer/` and `runs/nano-real-SEED` are kept: the same command goes on. Needs VITOS_DINOV2 and
`../shared/data`; some 20 minutes a run on one core. Writes `table.md` and `results.json` in this folder: intervals are
over seeds and questions. `tumour_type` is a set of its own in the table: its label is one of the whole image.
`--smoke` makes two updates a stage and forty questions, in `runs/transfer-smoke`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from studies.claims.run import train_once
from studies.nano_real.run import ROWS, Case, folder_of, read_cases, run_one, values
from studies.small.run import in_order

from vitos.eval.seeds import nested_bootstrap

HERE = Path(__file__).parent
DATA = Path("../shared/data")
SMOKE = (
    "train.localization_steps=2",
    "train.reasoning_steps=2",
    "train.warmup_steps=1",
    "data.limit_eval=40",
)
IMAGE_LEVEL = "tumour_type"
# Column, whose cases, condition in them.
COLUMNS = (
    ("base, all tokens", "moved", "base_dense"),
    ("base, own boxes", "moved", "untrained_sparse"),
    ("reinforced on the others", "moved", "sparse"),
    ("reinforced on all three", "home", "sparse"),
    ("all tokens, on the others", "moved", "dense"),
    ("random", "moved", "random"),
)
DIFFERENCES = (
    ("what carries over", ("moved", "sparse"), ("moved", "untrained_sparse")),
    ("what is lost by not having trained there", ("home", "sparse"), ("moved", "sparse")),
    ("own boxes, minus the base's all tokens", ("moved", "sparse"), ("moved", "base_dense")),
    ("own boxes, minus random tokens", ("moved", "sparse"), ("moved", "random")),
)


@dataclass(frozen=True, slots=True)
class Group:
    """A row of the table.

    Attributes:
        name: what stands in the first column.
        runs: of each way ("moved", "home") the cases of each seed, in one order.
    """

    name: str
    runs: dict[str, list[list[Case]]]

    def of(self, way: str, condition: str, key: str = "correct") -> np.ndarray:
        """A figure of all questions, shape (seeds, questions)."""
        runs = self.runs[way]
        return values(runs, condition, key, range(len(runs[0])))


def train(runs: Path, left_out: str, seed: int, more: Sequence[str]) -> None:
    """Train on the other sets and answer the one left out."""
    others = ", ".join(str(DATA / name / "train.json") for name in ROWS if name != left_out)
    sets = [f"seed={seed}", f"data.train=[{others}]", "evaluate.budgets=[]"]
    sets += [f"data.eval=[{DATA / left_out / 'test.json'}]", *more]
    if train_once(runs / f"without-{left_out}-{seed}", "recipes/nano-real.yaml", sets):
        print(f"done: without {left_out}, seed {seed}", flush=True)


def groups(runs: Path, seeds: Sequence[int], home: bool) -> list[Group]:
    """A row for each set left out and one for the questions whose label is the image's."""
    out = []
    trained = [read_cases(folder_of(seed)) for seed in seeds] if home else []
    for left_out, templates in ROWS.items():
        moved = [read_cases(runs / f"without-{left_out}-{seed}") for seed in seeds]
        same = [[case for case in run if case["template"] in templates] for run in trained]
        out.append(Group(left_out, {"moved": moved, "home": [in_order(run, moved[0]) for run in same]}))
        if IMAGE_LEVEL in templates:
            own = {
                way: [[case for case in run if case["template"] == IMAGE_LEVEL] for run in all_runs]
                for way, all_runs in out[-1].runs.items()
            }
            out.append(Group(IMAGE_LEVEL, own))
    return out


def table(rows: Sequence[Group]) -> tuple[str, list[dict[str, float | str]]]:
    """Accuracies and differences as Markdown, and the differences as records."""
    head = ("left out", "questions", *(name for name, _, _ in COLUMNS), "kept", "IoU before", "IoU")
    lines = [f"| {' | '.join(head)} |", f"| :-- |{' --: |' * (len(head) - 1)}"]
    for group in rows:
        cells = [group.of(way, c) if group.runs[way] else None for _, way, c in COLUMNS]
        told = ["–" if cell is None else f"{np.nanmean(cell):.3f}" for cell in cells]
        told += [
            f"{np.nanmean(group.of('moved', condition, key)):.3f}"
            for condition, key in (
                ("sparse", "kept_ratio"),
                ("untrained_localization", "iou"),
                ("localization", "iou"),
            )
        ]
        lines.append(f"| {group.name} | {len(group.runs['moved'][0])} | {' | '.join(told)} |")
    lines += ["", "| left out | difference | points | 95 % interval | visible |", "| :-- | :-- | --: | --: | --: |"]
    records: list[dict[str, float | str]] = []
    for group in rows:
        for name, first, second in DIFFERENCES:
            if not (group.runs[first[0]] and group.runs[second[0]]):
                continue
            found = nested_bootstrap(100 * (group.of(*first) - group.of(*second)))
            told_range = f"{found.low:+.1f} to {found.high:+.1f} | {found.visible:.1f}"
            lines.append(f"| {group.name} | {name} | {found.estimate:+.1f} | {told_range} |")
            bounds = {"points": found.estimate, "low": found.low, "high": found.high, "visible": found.visible}
            records.append({"left_out": group.name, "difference": name, **bounds})
    return "\n".join(lines) + "\n", records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    runs, seeds = (
        Path("runs/transfer-smoke" if args.smoke else "runs/transfer"),
        range(1 if args.smoke else args.seeds),
    )
    with ThreadPoolExecutor(args.jobs) as pool:
        more = SMOKE if args.smoke else ()
        list(pool.map(lambda job: train(runs, *job, more), [(name, seed) for seed in seeds for name in ROWS]))
        if not args.smoke:
            list(pool.map(run_one, seeds))
    text, records = table(groups(runs, seeds, home=not args.smoke))
    print(text)
    if not args.smoke:
        (HERE / "table.md").write_text(text, encoding="utf-8")
        (HERE / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
