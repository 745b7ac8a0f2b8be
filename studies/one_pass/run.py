"""The plans without written boxes on phantoms: `python studies/one_pass/run.py [--seeds 3]`. Resumable.

For each seed: phantoms whose gold boxes are hidden from training; heads distilled from the policy's own boxes, for
one_pass, for glance, and the trained rival (`--head glimpse`); one of them reinforced by rewards alone; then the same
reasoning stage under each plan, and for two_pass and gather, whose boxes the model writes. Each model answers the test
phantoms at the same budgets. The layer of the heads is chosen once, on held-out training images of the first seed,
never on the test split. Everything is below `--out`; `table.md` and `results.json` in it hold means over the questions
of all seeds, with intervals over seeds and questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.data.readers import read_records
from vitos.eval.scoring import Verdict, score_answer
from vitos.eval.seeds import nested_bootstrap

BUDGETS = ("0.125", "0.25")
RECIPE = "recipes/quickstart.yaml"
# Model → the selector by which it chooses, next to random.
ASKED = {
    "base": ("policy", "oracle"),
    "two_pass": ("policy", "oracle"),
    "gather": ("policy",),
    "one_pass": ("one_pass",),
    "reinforced": ("one_pass",),
    "glance": ("glance",),
    "glimpse": ("one_pass",),
}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--model", default="nano", help="checkpoint that writes boxes")
    parser.add_argument("--out", type=Path, default=Path("runs/one_pass"))
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="candidates for the heads' layer")
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--steps", type=int, default=1000, help="updates of a distillation, at most")
    parser.add_argument("--updates", type=int, default=40, help="updates of the head by rewards")
    parser.add_argument("--reasoning", type=int, default=100, help="updates of each reasoning stage")
    given = parser.parse_args()
    layers = best_layer(given)
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: run_seed(given, seed, layers), range(given.seeds)))
    results = summarize(given, layers)
    write_json_atomic(given.out / "results.json", results)
    write_text_atomic(given.out / "table.md", table(results))
    print((given.out / "table.md").read_text(encoding="utf-8"))


def best_layer(given: argparse.Namespace) -> int:
    """The layer behind which the first seed's head finds most of the evidence of held-out training images."""
    hidden = phantoms(given, 0)
    found = {}
    for layers in given.layers:
        report = json.loads((distil(given, 0, hidden, layers) / "distill.json").read_text(encoding="utf-8"))
        found[layers] = float(report["recall"]["all"]["0.25"])
    print("recall at 25 %, held-out training images, by layer:", found, flush=True)
    return max(found, key=lambda layers: found[layers])


def run_seed(given: argparse.Namespace, seed: int, layers: int) -> None:
    """Data, heads, trainings and answers of one seed."""
    hidden, folder = phantoms(given, seed), given.out / str(seed)
    head = distil(given, seed, hidden, layers)
    glance = distil(given, seed, hidden, layers, "--plan", "glance")
    glimpse = distil(given, seed, hidden, layers, "--head", "glimpse")
    rewards = {
        "sparsify.plan": "one_pass", "train.schedule": "localization-only", "train.localization_steps": given.updates,
        "train.unfrozen_parameters": "evidence_head", "train.stage1_num_localizations": 8,
        "train.stage1_num_reasonings": 2, "train.stage1_learning_rate": "null", "train.learning_rate": 1e-3,
        "train.localization_kl": 0.0,
    }  # fmt: skip
    rewarded = train(given, seed, "rewarded-head", head, hidden, rewards)
    stage = {
        "train.schedule": "reasoning-only", "train.reasoning_steps": given.reasoning,
        "train.stage1_num_localizations": "null", "train.stage1_num_reasonings": "null",
        "train.stage1_learning_rate": "null", "train.localization_kl": 0.0,
    }  # fmt: skip
    models = {
        "base": given.model,
        "two_pass": train(given, seed, "two_pass", given.model, hidden, stage),
        "gather": train(given, seed, "gather", given.model, hidden, stage | {"sparsify.plan": "gather"}),
        "one_pass": train(given, seed, "one_pass", head, hidden, stage | {"sparsify.plan": "one_pass"}),
        "reinforced": train(given, seed, "reinforced", rewarded, hidden, stage | {"sparsify.plan": "one_pass"}),
        "glance": train(given, seed, "glance", glance, hidden, stage | {"sparsify.plan": "glance"}),
        "glimpse": train(given, seed, "glimpse", glimpse, hidden, stage | {"sparsify.plan": "one_pass"}),
    }
    for name, path in models.items():
        selectors = [part for one in (*ASKED[name], "random") for part in ("--selector", one)]
        budgets = [part for budget in BUDGETS for part in ("--budget", budget)]
        out = folder / "answers" / name
        vitos(
            out / "results.json",
            *("bench", "run", f"{name}={path}", "--out", out, "--data", f"phantom={folder / 'phantom/test.json'}"),
            *(*selectors, *budgets, "--no-looks", "--max-tokens", 96, "--batch-size", 100),
        )


def phantoms(given: argparse.Namespace, seed: int) -> Path:
    """The training records of a seed, without their gold boxes."""
    data = given.out / str(seed) / "phantom"
    counts = ("--train", given.train, "--val", 0, "--test", given.test)
    vitos(data / "test.json", "data", "phantom", data, *counts, "--seed", seed)
    out = data / "train-without-boxes.json"
    if not out.exists():
        rows = json.loads((data / "train.json").read_text(encoding="utf-8"))
        write_json_atomic(out, [{key: value for key, value in row.items() if key != "bbox"} for row in rows])
    return out


def distil(given: argparse.Namespace, seed: int, data: Path, layers: int, *more: str) -> Path:
    """The base model with a head that learned from its own boxes."""
    out = given.out / str(seed) / f"head-{'-'.join((str(layers), *more[1:]))}"
    options = ("--steps", given.steps, "--max-tokens", 96, "--seed", seed, "--layers", layers, *more)
    vitos(out / "distill.json", "distill", given.model, "--data", data, "--out", out, *options)
    return out


def train(
    given: argparse.Namespace, seed: int, name: str, start: str | Path, data: Path, sets: Mapping[str, object]
) -> Path:
    """A model trained from another one."""
    run = given.out / str(seed) / f"run-{name}"
    common = {
        "model.path": start, "output_dir": run, "seed": seed, "data.train": data, "data.eval": "[]",
        "evaluate.budgets": "[]", "evidence_head": "null", "train.log_samples_steps": 0, "train.save_steps": 1000,
    }  # fmt: skip
    pairs = [part for key, value in (common | dict(sets)).items() for part in ("--set", f"{key}={value}")]
    vitos(run / "model/COMPLETE", "train", RECIPE, *pairs)
    return run / "model"


def vitos(done: Path, *command: object) -> None:
    """A `vitos` command with one thread, unless the file that it ends with is there; its output goes to a log."""
    if done.exists():
        return
    print("vitos", *command, flush=True)
    done.parent.parent.mkdir(parents=True, exist_ok=True)
    log = done.parent.parent / f"{done.parent.name}.log"
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "vitos", *map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        raise SystemExit(f"failed with {code}, see {log}")


# --- the table ------------------------------------------------------------------------------------------------------


def summarize(given: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Accuracy of each model and condition, and its paired differences to the base's dense answers and to two_pass."""
    right: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for seed in range(given.seeds):
        folder = given.out / str(seed)
        records = {record.id: record for record in read_records(folder / "phantom/test.json")}
        for path in sorted((folder / "answers").rglob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            model = path.relative_to(folder / "answers").parts[0]
            found: dict[str, dict[str, float]] = {}
            for row in rows:
                if row.get("condition", "localize") != "localize" and row.get("text") is not None:
                    verdict = score_answer(row["text"], records[row["id"]]).verdict
                    found.setdefault(row["condition"], {})[row["id"]] = float(verdict is Verdict.CORRECT)
            for condition, by_id in found.items():
                values = [by_id.get(name, np.nan) for name in sorted(records)]
                right.setdefault((model, condition), {})[seed] = np.array(values)
    rows = []
    for (model, condition), values in right.items():
        budget = condition.partition("@")[2]
        rivals = {
            "minus_base_dense": right["base", "dense"],
            "minus_two_pass": right.get(("two_pass", f"policy@{budget}")),
        }
        rows.append(
            {"model": model, "condition": condition, "accuracy": interval(list(values.values()))}
            | {
                name: interval([values[seed] - other[seed] for seed in values]) if other else None
                for name, other in rivals.items()
            }
        )
    return {"command": f"python studies/one_pass/run.py --seeds {given.seeds}", "layers": layers, "rows": rows}


def interval(values: Sequence[np.ndarray]) -> list[float]:
    """Mean and bounds of an interval of 95 % over seeds and questions; questions without an answer are left out."""
    spread = nested_bootstrap(np.stack(values), samples=10_000, seed=0)
    return [spread.estimate, spread.low, spread.high]


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Plans without written boxes, on phantoms",
        "",
        f"`{results['command']}`; heads behind layer {results['layers']}. Accuracy in per cent with an interval over "
        "seeds and questions, and paired differences in points: to the base model's dense answers, and to two_pass "
        "with its own boxes at the same budget.",
        "",
        "| model | condition | accuracy | minus base dense | minus two_pass |",
        "| :-- | :-- | --: | --: | --: |",
    ]
    for row in results["rows"]:
        cells = ("–" if row[key] is None else shown(row[key]) for key in ("minus_base_dense", "minus_two_pass"))
        lines.append(f"| {row['model']} | {row['condition']} | {shown(row['accuracy'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float]) -> str:
    """A mean and its interval, in per cent."""
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
