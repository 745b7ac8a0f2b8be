"""Plan one_pass on phantoms: `python studies/one_pass/run.py [--seeds 3]`. Resumable: finished parts are kept.

For each seed: phantoms whose gold boxes are hidden from training; the head distilled from the policy's own boxes, the
rival (`--head glimpse`) from the same ones; the head reinforced by rewards alone; then one `vitos bench run` over the
test phantoms. The layer of the head is chosen on the held-out images of the distillation, never on the test split.
Everything is below `--out`; `table.md` and `results.json` in it hold means over the seeds with paired bootstrap
intervals (questions of all seeds).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.data.readers import read_records
from vitos.eval.scoring import Verdict, score_answer
from vitos.eval.statistics import bootstrap_mean

BUDGETS = ("0.125", "0.25")
SELECTORS = ("one_pass", "evidence_head", "policy", "oracle", "random", "fastv")
RECIPE = "recipes/quickstart.yaml"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="nano", help="checkpoint that writes boxes, such as runs/quickstart/model")
    parser.add_argument("--out", type=Path, default=Path("runs/one_pass"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="candidates for the head's layer")
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--steps", type=int, default=1500, help="updates of the distillation, at most")
    parser.add_argument("--updates", type=int, default=60, help="updates of the reinforcement; 0 leaves it out")
    given = parser.parse_args()
    for seed in range(given.seeds):
        run_seed(given, seed, given.out / str(seed))
    results = summarize(given, [given.out / str(seed) / "bench" for seed in range(given.seeds)])
    write_json_atomic(given.out / "results.json", results)
    write_text_atomic(given.out / "table.md", table(results))
    print((given.out / "table.md").read_text(encoding="utf-8"))


def run_seed(given: argparse.Namespace, seed: int, folder: Path) -> None:
    """Data, heads and answers of one seed."""
    data = folder / "phantom"
    counts = ("--train", given.train, "--val", 0, "--test", given.test)
    vitos(data / "test.json", "data", "phantom", data, *counts, "--seed", seed)
    hidden = without_boxes(data / "train.json")
    heads = {}
    for layers in given.layers:
        heads[layers] = folder / f"own-{layers}"
        distil(heads[layers], given, hidden, seed, layers)
    best = max(heads, key=lambda layers: found(heads[layers]))
    distil(folder / "glimpse", given, hidden, seed, best, "--head", "glimpse")
    models = {"distilled": heads[best], "glimpse": folder / "glimpse"}
    if given.updates:
        models["reinforced"] = folder / "reinforced/model"
        sets = {
            "model.path": heads[best], "output_dir": folder / "reinforced", "seed": seed, "data.train": hidden,
            "data.eval": "[]", "sparsify.plan": "one_pass", "train.schedule": "localization-only",
            "train.localization_steps": given.updates, "train.unfrozen_parameters": "evidence_head",
            "train.stage1_num_localizations": 8, "train.stage1_num_reasonings": 2,
            "train.stage1_learning_rate": 1e-3, "train.localization_kl": 0.0,
        }  # fmt: skip
        pairs = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        vitos(models["reinforced"] / "COMPLETE", "train", RECIPE, *pairs)
    named = [f"{name}={path}" for name, path in models.items()]
    options = [part for name in SELECTORS for part in ("--selector", name)]
    options += [part for budget in BUDGETS for part in ("--budget", budget)]
    vitos(
        folder / "bench/results.json",
        *("bench", "run", *named, "--out", folder / "bench", "--data", f"phantom={data / 'test.json'}"),
        *(*options, "--no-looks", "--max-tokens", 96, "--batch-size", 100),
    )


def distil(out: Path, given: argparse.Namespace, data: Path, seed: int, layers: int, *more: str) -> None:
    """One head, by the policy's own boxes."""
    options = ("--steps", given.steps, "--max-tokens", 96, "--seed", seed, "--layers", layers, *more)
    vitos(out / "distill.json", "distill", given.model, "--data", data, "--out", out, *options)


def found(folder: Path) -> float:
    """Share of the evidence found at a quarter of the tokens, on the distillation's held-out images."""
    report = json.loads((folder / "distill.json").read_text(encoding="utf-8"))
    return float(report["recall"]["all"]["0.25"])


def vitos(done: Path, *command: object) -> None:
    """A `vitos` command, unless the file that it ends with is there."""
    if not done.exists():
        print("vitos", *command, flush=True)
        subprocess.run([sys.executable, "-m", "vitos", *map(str, command)], check=True)


def without_boxes(source: Path) -> Path:
    """The same records without their gold boxes."""
    out = source.with_name("train-without-boxes.json")
    if not out.exists():
        rows = json.loads(source.read_text(encoding="utf-8"))
        write_json_atomic(out, [{key: value for key, value in row.items() if key != "bbox"} for row in rows])
    return out


# --- the table ------------------------------------------------------------------------------------------------------


def summarize(given: argparse.Namespace, folders: Sequence[Path]) -> dict[str, Any]:
    """Accuracy of each model and condition over the questions of all seeds, and its difference to dense."""
    right: dict[tuple[str, str], list[float]] = {}
    for folder in folders:
        records = {record.id: record for record in read_records(folder.parent / "phantom/test.json")}
        for path in sorted((folder / "answers").rglob("*.jsonl")):
            model = path.relative_to(folder / "answers").parts[0]
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for row in sorted(rows, key=lambda row: row["id"]):
                if row["condition"] != "localize" and row["text"] is not None:
                    verdict = score_answer(row["text"], records[row["id"]]).verdict
                    right.setdefault((model, row["condition"]), []).append(float(verdict is Verdict.CORRECT))
    out = []
    for (model, condition), values in right.items():
        dense = np.array(right[model, "dense"])
        whole = len(values) == len(dense)
        out.append(
            {
                "model": model,
                "condition": condition,
                "questions": len(values),
                "accuracy": interval(np.array(values)),
                "minus_dense": interval(np.array(values) - dense) if whole else None,
            }
        )
    return {"seeds": given.seeds, "model": given.model, "layers": given.layers, "rows": out}


def interval(values: np.ndarray) -> list[float]:
    """Mean and bounds of a bootstrap interval of 95 %."""
    spread = bootstrap_mean(values, samples=10_000, seed=0)
    return [spread.estimate, spread.low, spread.high]


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# One pass on phantoms",
        "",
        f"`python studies/one_pass/run.py --seeds {results['seeds']} --model {results['model']}`. Accuracy in per "
        "cent with a bootstrap interval over the questions of all seeds, and the paired difference to dense.",
        "",
        "| model | condition | questions | accuracy | minus dense |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    for row in results["rows"]:
        other = "–" if row["minus_dense"] is None else shown(row["minus_dense"])
        lines.append(
            f"| {row['model']} | {row['condition']} | {row['questions']} | {shown(row['accuracy'])} | {other} |"
        )
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float]) -> str:
    """A mean and its interval, in per cent."""
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
