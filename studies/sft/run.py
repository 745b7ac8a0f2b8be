"""`vitos sft` against a plain loop of PyTorch: `python -m studies.sft.run`, about 15 minutes on one core.

Both teach the language model of an untrained nano the same questions in the same order with the same options: one by
the command (`study.yaml`), the other by `scripts/plain_loop.py`, which made nano. They start from one base: nano's
architecture behind a short version of its first two parts (`scripts/make_nano.py`: the encoder, then names), without
which a model of this size learns nothing from records in minutes. Each runs in a process of its own, of one thread.

Prints and writes `table.md` and `results.json` in this folder: loss, figures on validation phantoms, seconds of the
whole process by the clock and of the processor. What is finished in `runs/sft/` is kept: the same command goes on; the
plain loop starts again, since it has no checkpoints. `--smoke` tries everything in seconds, in `runs/sft-smoke`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitos.cli.sft import supervised_config
from vitos.config.recipe import Recipe, load_recipe
from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.policy.vlm import SparseVLM
from vitos.rl.callbacks import read_metrics
from vitos.rl.checkpoint import is_complete, staged_folder
from vitos.rl.lessons import Lesson, record_lesson
from vitos.rl.sft import SFT_METRICS, Ordered

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
COLUMNS = {
    "loss": "loss, last tenth",
    "dense_accuracy": "all tokens",
    "localization_accuracy": "localization",
    "mean_iou": "IoU",
    "parse_rate": "boxes that parse",
    "sparse_accuracy": "own boxes",
    "seconds": "seconds",
    "processor_seconds": "of the processor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done.

    Attributes:
        runs: folder of everything that is made.
        train, val: number of phantoms.
        scenes, encoder_steps, name_steps: size of the base, as in `scripts/make_nano.py`.
        sets: settings of the recipe.
    """

    runs: Path
    train: int = 3000
    val: int = 200
    scenes: int = 2000
    encoder_steps: int = 500
    name_steps: int = 200
    sets: tuple[str, ...] = ()


SMOKE = Size(
    runs=Path("runs/sft-smoke"),
    train=8,
    val=5,
    scenes=60,
    encoder_steps=2,
    name_steps=2,
    sets=("warm_start.steps=3", "warm_start.batch_size=4"),
)


# --- the base -------------------------------------------------------------------------------------------------------


def make_base(size: Size) -> Path:
    """Nano's architecture with a trained encoder and a language model that knows names; kept if it is there."""
    folder = size.runs / "base"
    if is_complete(folder):
        return folder
    sys.path.insert(0, str(SCRIPTS))  # they import one another as scripts do
    import make_nano
    from nano_model import NANO_SPEC, build_nano

    args = argparse.Namespace(learning_rate=1e-3, matrix_rate=0.02)
    scenes, images = make_nano.make_scenes(size.scenes, seed=0)
    policy = SparseVLM(build_nano(0), NANO_SPEC)
    report = make_nano.reporter()
    make_nano.train_encoder(policy.backbone, scenes, images, size.encoder_steps, lambda *x: report("encoder", *x))
    lessons = make_nano.name_batches(scenes, make_nano.encode_all(policy.backbone, images), 0)
    make_nano.train_language(policy, lessons, size.name_steps, args, lambda *x: report("names", *x))
    with staged_folder(folder) as staging:
        policy.save_pretrained(staging)
    return folder


# --- the two ways ---------------------------------------------------------------------------------------------------


def settings(size: Size, way: str, seed: int) -> list[str]:
    """Settings of the recipe for one run."""
    fixed = [f"output_dir={size.runs / f'{way}-{seed}'}", f"model.path={size.runs / 'base'}"]
    return [*fixed, f"data.train={size.runs / 'data' / 'train.json'}", f"seed={seed}", *size.sets]


def train_plainly(recipe: Recipe) -> None:
    """The recipe's supervised start by the plain loop, which makes neither checkpoints nor checks."""
    sys.path.insert(0, str(SCRIPTS))
    from plain_loop import train_supervised

    config, run = supervised_config(recipe), Path(recipe.output_dir)
    policy = SparseVLM.from_pretrained(recipe.model.path, device="cpu", dtype=torch.float32)
    backbone = policy.backbone
    for module in backbone.vision_modules:
        module.requires_grad_(False)
    records = read_records(recipe.data.train[0])
    lessons = [record_lesson(r, policy.encode(*r.image_paths).visuals, backbone, policy.spec) for r in records]
    order = list(Ordered(records, config.max_steps * config.batch_size, config.seed))

    def batches() -> Iterator[list[Lesson]]:
        for start in range(0, len(order), config.batch_size):
            yield [lessons[i] for i in order[start : start + config.batch_size]]

    rows: list[dict[str, float]] = []
    train_supervised(
        backbone,
        batches(),
        steps=config.max_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_share=config.warmup_share,
        max_grad_norm=config.max_grad_norm,
        answer_weight=config.answer_weight,
        on_step=lambda step, loss: rows.append({"step": step, "loss": loss}),
    )
    (run / "sft").mkdir(parents=True, exist_ok=True)
    (run / "sft" / SFT_METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with staged_folder(run / "warm_start") as staging:
        policy.save_pretrained(staging)


def run_one(size: Size, way: str, seed: int) -> dict[str, Any]:
    """Train by one way in a process of its own, then measure; kept if it is finished."""
    run = size.runs / f"{way}-{seed}"
    finished, spent = run / "figures.json", run / "spent.json"
    if finished.is_file():
        return dict(json.loads(finished.read_text(encoding="utf-8")))
    sets = [part for value in settings(size, way, seed) for part in ("--set", value)]
    recipe = str(HERE / "study.yaml")
    verb = ["vitos", "sft", recipe, "--resume"] if way == "vitos" else ["studies.sft.run", "--plain", recipe]
    if not is_complete(run / "warm_start"):
        run.mkdir(parents=True, exist_ok=True)
        before = json.loads(spent.read_text(encoding="utf-8")) if way == "vitos" and spent.is_file() else [0.0, 0.0]
        clock, work = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            subprocess.run([sys.executable, "-m", *verb, *sets], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        finally:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - work.ru_utime - work.ru_stime
            now = [before[0] + time.perf_counter() - clock, before[1] + used]
            spent.write_text(json.dumps(now) + "\n", encoding="utf-8")
    losses = [row["loss"] for row in read_metrics(run / "sft" / SFT_METRICS) if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    seconds = json.loads(spent.read_text(encoding="utf-8"))
    figures = {
        "updates": len(losses),
        "loss": sum(tail) / len(tail),
        "seconds": seconds[0],
        "processor_seconds": seconds[1],
        **measure(SparseVLM.from_pretrained(run / "warm_start", device="cpu"), size),
    }
    finished.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def measure(policy: SparseVLM, size: Size) -> dict[str, float]:
    """Greedy figures on validation phantoms."""
    records = read_records(size.runs / "data" / "val.json")
    asked = Settings(batch_size=100, max_localization_tokens=96, max_reasoning_tokens=32)
    results = summarize(cases_in_memory(policy, records, asked), bootstrap_samples=1)
    return {name: results[name] for name in COLUMNS if name in results}


# --- what it says ---------------------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown; a dash where a row has none."""

    def cell(name: str, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.0f}" if "seconds" in name else f"{value:.3f}"

    lines = [f"| way | {' | '.join(COLUMNS.values())} |", f"| :-- |{' --: |' * len(COLUMNS)}"]
    lines += [f"| {way} | {' | '.join(cell(c, row.get(c)) for c in COLUMNS)} |" for way, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0; each takes five minutes more")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)  # one run of the plain loop
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plain:
        train_plainly(load_recipe(args.plain, args.set))
        return
    size = SMOKE if args.smoke else Size(runs=Path("runs/sft"))
    for split, count in (("train", size.train), ("val", size.val)):
        if not (size.runs / "data" / f"{split}.json").is_file():
            write_phantoms(size.runs / "data", split, count)
    make_base(size)
    rows = {
        f"{'`vitos sft`' if way == 'vitos' else 'plain loop'}, seed {seed}": run_one(size, way, seed)
        for seed in range(args.seeds)
        for way in ("plain", "vitos")
    }
    rows["nano as shipped"] = measure(SparseVLM.from_pretrained("nano", device="cpu"), size)
    text = table(rows)
    print(text)
    if not args.smoke:
        (HERE / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (HERE / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
