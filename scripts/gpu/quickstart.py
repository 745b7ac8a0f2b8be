"""(d) The quickstart on the device, and its figures against the CPU's.

First the shipped model answers the same questions on both. Then its first updates are made on both: their seeds are
the same, so rewards and losses must agree up to rounding that flips a token now and then. Last, the whole recipe is
trained and evaluated on the device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from scripts.gpu import Setting
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vitos.core.record import Record
from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records
from vitos.policy.plans import Limits
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.trainer import DualStreamTrainer

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"
FIGURES = ("reward/localization", "reward/reasoning", "iou", "loss/policy")
SECONDS = 85.0
"""Training on the device is stopped after this time, so that the part can still be evaluated within its box."""
AGREE = 0.97
"""Least share of questions that both devices answer alike: greedy texts differ where two tokens are almost equal."""


class Until(TrainerCallback):
    """Ends the training at a time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_training_stop |= time.perf_counter() > self.end


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """Answers, first updates, and the whole training."""
    questions, learned = (2, 4) if setting.tiny else (256, 800)
    test = read_records(write_phantoms(setting.folder / "phantom", "test", questions))
    train = read_records(write_phantoms(setting.folder / "phantom", "train", learned))
    cpu = torch.device("cpu")
    alone = [answers(SparseVLM.from_pretrained("nano", device=cpu), test, plan) for plan in ("dense", "two_pass")]
    placed = [
        answers(SparseVLM.from_pretrained("nano", device=setting.device), test, plan) for plan in ("dense", "two_pass")
    ]
    yield compared(test, alone, placed, setting)
    steps = (1, 1)
    runs = {
        name: fit(device, train, setting.folder / f"first-{name}", steps, setting.tiny)
        for name, device in (("cpu", cpu), ("device", setting.device))
    }
    yield same_updates(runs["cpu"], runs["device"])
    started = time.perf_counter()
    logs = fit(setting.device, train, setting.folder / "whole", (1, 1) if setting.tiny else None, setting.tiny)
    trained = SparseVLM.from_pretrained(setting.folder / "whole" / "model", device=setting.device)
    found = [answers(trained, test, plan) for plan in ("dense", "two_pass")]
    accuracy = [share(test, given) for given in found]
    yield {
        "case": f"{len(logs)} updates of the recipe's {2 if setting.tiny else 150}, {len(test)} test questions",
        "ok": accuracy[1] > share(test, placed[1]) if not setting.tiny else None,
        "seconds": time.perf_counter() - started,
        "accuracy": {"dense": accuracy[0], "two_pass": accuracy[1]},
        "before": {"dense": share(test, placed[0]), "two_pass": share(test, placed[1])},
        "summary": f"two_pass {share(test, placed[1]):.1%} -> {accuracy[1]:.1%}",
    }


def compared(
    test: Sequence[Record], alone: Sequence[list[str | None]], placed: Sequence[list[str | None]], setting: Setting
) -> dict[str, Any]:
    """How many answers are the same."""
    same = [sum(a == b for a, b in zip(x, y, strict=True)) / len(x) for x, y in zip(alone, placed, strict=True)]
    figures = {
        plan: {"cpu": share(test, x), "device": share(test, y), "same": s}
        for plan, x, y, s in zip(("dense", "two_pass"), alone, placed, same, strict=True)
    }
    return {
        "case": f"{len(test)} answers of the shipped model on {setting.device} and on the CPU",
        "ok": min(same) >= AGREE,
        "answers": figures,
        "summary": ", ".join(f"{plan} {s:.1%} the same" for plan, s in zip(figures, same, strict=True)),
    }


def same_updates(cpu: list[dict[str, float]], device: list[dict[str, float]]) -> dict[str, Any]:
    """How far the figures of the first updates are apart."""
    gaps = {
        name: max(abs(a[name] - b[name]) for a, b in zip(cpu, device, strict=True))
        for name in FIGURES
        if all(name in log for log in (*cpu, *device))
    }
    return {
        "case": f"the first {len(cpu)} updates on the device and on the CPU",
        "ok": bool(gaps) and max(gaps.values()) < 0.1,
        "largest_gaps": gaps,
        "cpu": cpu,
        "device_figures": device,
        "summary": ", ".join(f"{name} differs by {gap:.2g}" for name, gap in gaps.items()),
    }


def answers(vlm: SparseVLM, records: Sequence[Record], plan: str) -> list[str | None]:
    """The model's greedy answers by a plan."""
    limits = Limits(max_tokens=32, max_evidence_tokens=96)  # those of the recipe
    found: list[str | None] = []
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        queries = [Query(vlm.encode(record.image_paths[0]), record.question) for record in part]
        found += [finding.answer for finding in vlm.answer(queries, plan=plan, limits=limits)]
    return found


def share(records: Sequence[Record], given: Sequence[str | None]) -> float:
    """Share of right answers."""
    return sum(answer == record.answer for record, answer in zip(records, given, strict=True)) / len(records)


def fit(
    device: torch.device, records: Sequence[Record], folder: Path, steps: tuple[int, int] | None, tiny: bool
) -> list[dict[str, float]]:
    """Train as the quickstart's recipe says, by its own steps or fewer; the figures of each update."""
    options = dict(yaml.safe_load(RECIPE.read_text("utf-8"))["train"])
    if steps is not None:
        options |= {"localization_steps": steps[0], "reasoning_steps": steps[1]}
    if tiny:
        few = {"questions_per_step": 2, "num_reasonings": 2, "stage1_num_localizations": 2}
        options |= few | {"max_localization_tokens": 24, "max_reasoning_tokens": 12}
    config = DualStreamConfig(
        **options,
        output_dir=str(folder),
        seed=0,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        log_samples_steps=0,
    )
    policy = SparseVLM.from_pretrained("nano", device=device)
    DualStreamTrainer(policy, config, records, callbacks=[Until(SECONDS)]).train()
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [log for log in map(json.loads, lines) if "loss/policy" in log]
