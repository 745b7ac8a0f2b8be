"""Output of a run while it goes on: a bar with the main figures, `metrics.jsonl`, and drawn samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.rl.rollout import QuestionGroup

METRICS_FILE = "metrics.jsonl"
LINE = 80
"""Columns of a line where the terminal does not say."""
# Figures of the bar, in its order, with their short names.
_SHOWN = {
    "reward/localization": "r_loc",
    "reward/reasoning": "r_rea",
    "accuracy/localization": "acc_loc",
    "accuracy/sparse": "acc_sparse",
    "iou": "iou",
    "kept_ratio": "kept",
    "fallback_rate": "fallback",
    "parse_rate": "parse",
}


class LogCallback(TrainerCallback):
    """A callback that gets the figures logged by the first process."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and state.is_world_process_zero:
            self.on_figures(args, state, logs)

    def on_figures(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        """Called with the figures of each log; the last log is Trainer's summary."""
        raise NotImplementedError


class MetricsFileCallback(LogCallback):
    """Writes one JSON line per log to `metrics.jsonl`, whatever `report_to` names.

    A resumed run first removes the lines after its checkpoint, so that no update is missing or occurs twice.

    Args:
        file: name of the file in the folder of the run.
        figure: a figure that the log of an update has; Trainer's summary lacks it and is not written.
    """

    def __init__(self, file: str = METRICS_FILE, figure: str = "reward/localization") -> None:
        self._file, self._figure = file, figure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / self._file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, "".join(_line(row) for row in read_metrics(path) if row["step"] <= state.global_step))

    def on_figures(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        if self._figure not in logs:
            return
        with open(Path(str(args.output_dir)) / self._file, "a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **logs}))


class FiguresCallback(LogCallback):
    """Updates done and left of the whole run, followed by as many figures as fit into the line.

    Args:
        shown: figures in their order with their short names; by default rewards, accuracies and rates.
    """

    def __init__(self, shown: Mapping[str, str] = _SHOWN) -> None:
        self._shown = shown
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            line = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=line)

    def on_figures(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        if self._bar is not None:
            room = (self._bar.ncols or LINE) - 2 * len(str(state.max_steps)) - len("/ [1:00:00<1:00:00], ")
            figures = [f"{short}={logs[key]:.2f}" for key, short in self._shown.items() if key in logs]
            while len(text := ", ".join(figures)) > room and figures:
                figures.pop()
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(state.global_step - self._bar.n)
            self._bar.refresh()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, oldest first; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_samples(
    run: Path, step: int, groups: Sequence[QuestionGroup], draw: Callable[[QuestionGroup], Image.Image] | None = None
) -> None:
    """Write questions of one update with all their texts to `samples/step-N.json`; with `draw`, also pictures."""
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, group in enumerate(groups):
        row: dict[str, Any] = {
            "id": group.record.id,
            "question": group.record.question,
            "gold": group.record.answer,
            "localizations": [
                {
                    "text": rollout.completion.text,
                    "kept_ratio": kept.ratio,
                    "fallback": kept.fallback,
                    "rewards": rewards.tolist(),
                    "reasonings": [r.completion.text for r in answers],
                }
                for rollout, kept, rewards, answers in zip(
                    group.localizations, group.kept, group.rewards.localization, group.reasonings, strict=True
                )
            ],
        }
        if draw is not None:
            row["overlay"] = f"step-{step}-{index}.png"
            draw(group).save(folder / row["overlay"])
        rows.append(row)
    write_json_atomic(folder / f"step-{step}.json", rows)


def _line(row: dict[str, Any]) -> str:
    """One JSON line; numbers that are not finite become null, since JSON has no other word for them."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
