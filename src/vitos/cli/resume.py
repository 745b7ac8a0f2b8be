"""What `--resume` may change: a run's own recipe, compared with the one that it is to go on with.

The number of updates of the last stage may grow: the run trains on. What does not touch the training (evaluation,
logging, how often a checkpoint is written) may change and is applied. Every other change is refused by name, so that
`recipe.yaml` always says what was done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitos.config.recipe import Recipe, dump_recipe, load_recipe
from vitos.config.yaml_file import ConfigError
from vitos.core.record import Record
from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.eval.store import questions_fingerprint
from vitos.rl.checkpoint import all_checkpoints, complete_checkpoints, is_complete
from vitos.rl.schedule import make_stages
from vitos.rl.trainer import FINAL

RECIPE, TRAINING_DATA, WARM_START = "recipe.yaml", "training_data.json", "warm_start"
WARM_START_ADAPTER, SFT = "warm_start_adapter", "sft"
# Keys that change nothing about what is trained; a section stands for all of its keys.
FREE = (
    "name",
    "data.eval",
    "data.limit_eval",
    "data.cache",
    "evaluate",
    *(f"judge.{name}" for name in ("url", "key_variable", "parallel", "seconds", "retries", "pause", "longest_pause")),
    *(f"judge.{name}" for name in ("max_requests", "max_total_tokens", "cache")),
    "warm_start.save_steps",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "train.log_gradient_cosine_steps",
    "train.log_samples_steps",
    "train.log_samples",
    "train.max_skipped_updates",
    *(f"trainer.{name}" for name in ("disable_tqdm", "report_to", "run_name", "logging_dir", "log_level")),
)
_STEPS = ("train.localization_steps", "train.reasoning_steps")


def check_resumed(run: Path, recipe: Recipe, records: Sequence[Record]) -> None:
    """Compare what a resumed run is to do with what its folder says was begun; where nothing was trained, all is free.

    Raises:
        ConfigError: for other changes of the recipe or the training questions than may be; it names all of them.
    """
    if (run / RECIPE).is_file() and _anything_trained(run):
        old = load_recipe(run / RECIPE)
        problems = [*_problems(old, recipe), *_data_problems(run, records)]
        if recipe.train.total_steps > old.train.total_steps and not complete_checkpoints(run):
            problems.append("train: no checkpoint is left to train on from")
        if problems:
            advice = "set these back, or start another run with another output_dir"
            raise ConfigError(f"{run / RECIPE}: this run cannot go on with a changed recipe; {advice}", problems)


def begin_run(run: Path, recipe: Recipe, records: Sequence[Record]) -> None:
    """Write what is about to be done into the folder of a run."""
    run.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run / RECIPE, dump_recipe(recipe))
    write_json_atomic(run / TRAINING_DATA, _described(records))


def is_trained(run: Path, recipe: Recipe) -> bool:
    """The final model is there, with all updates of the recipe in it."""
    found = complete_checkpoints(run)
    updates = int(found[-1].name.rpartition("-")[2]) if found else recipe.train.total_steps
    return is_complete(run / FINAL) and updates >= recipe.train.total_steps


def _anything_trained(run: Path) -> bool:
    begun = all_checkpoints(run) or all_checkpoints(run / SFT)
    return bool(begun) or any((run / name).exists() for name in (WARM_START, FINAL))


def _problems(old: Recipe, new: Recipe) -> Iterator[str]:
    """One line for each change that cannot be applied."""
    before, after = (dict(_flat(dataclasses.asdict(recipe))) for recipe in (old, new))
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if a == b or any(key == free or key.startswith(f"{free}.") for free in FREE):
            continue
        if key in _STEPS:
            if not _grows(old, new):
                yield f"{key}: {a} updates were begun, now {b}; only the last stage can be made longer"
        else:
            yield f"{key}: the run was begun with {a}, now {b}"


def _grows(old: Recipe, new: Recipe) -> bool:
    """The stages are the same, and the last one has more updates."""
    before, after = make_stages(old.train), make_stages(new.train)
    same = len(before) == len(after) and before[:-1] == after[:-1]
    return same and after[-1].steps > before[-1].steps and after[-1].start == before[-1].start


def _data_problems(run: Path, records: Sequence[Record]) -> Iterator[str]:
    file = run / TRAINING_DATA
    if not file.is_file():  # a run of an earlier version
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), _described(records)
    if before != now:
        what = f"{before['questions']} questions were trained on, now {now['questions']}"
        yield f"data.train: the files hold other questions, answers or boxes than when the run was begun ({what})"


def _described(records: Sequence[Record]) -> dict[str, Any]:
    return {"questions": len(records), "fingerprint": questions_fingerprint(records)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; an empty mapping has none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
