"""Samples of an update for the trackers of `report_to`: a table of texts, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

COLUMNS = ("id", "question", "gold", "localization", "reasoning", "kept", "fallback", "reward")


def track_samples(callbacks: Iterable[TrainerCallback], run: Path, step: int) -> None:
    """Send samples that `write_samples` wrote to TensorBoard, W&B and trackio, as far as their callbacks have begun.

    Args:
        run: folder of the run, with `samples/step-<step>.json`.
        step: number of the update, from 1.
    """
    trackers = [one for one in callbacks if isinstance(one, TensorBoardCallback | WandbCallback | TrackioCallback)]
    if not trackers:
        return
    rows = json.loads((run / "samples" / f"step-{step}.json").read_text(encoding="utf-8"))
    pictures: dict[str, Image.Image] = {
        row["id"]: Image.open(run / "samples" / row["overlay"]) for row in rows if "overlay" in row
    }
    table = [_cells(row) for row in rows]
    for callback in trackers:
        if isinstance(callback, TensorBoardCallback):
            if callback.tb_writer is not None:
                _to_tensorboard(callback.tb_writer, table, pictures, step)
        elif callback._initialized:
            tool: Any = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            shown = [tool.Image(picture, caption=name) for name, picture in pictures.items()]
            logged: dict[str, Any] = {f"samples/{i}": image for i, image in enumerate(shown)}
            tool.log(logged | {"samples/table": tool.Table(columns=[*COLUMNS], data=table), "train/global_step": step})


def _cells(row: dict[str, Any]) -> list[str | float | bool]:
    """The first localization of a question and its first reasoning, in the order of COLUMNS."""
    nothing: dict[str, Any] = {"text": "", "reasonings": [], "kept_ratio": 1.0, "fallback": False, "rewards": [0.0]}
    first: dict[str, Any] = next(iter(row["localizations"]), nothing)  # a run without pruning may have none
    texts = [row["id"], row["question"], row["gold"], first["text"], next(iter(first["reasonings"]), "")]
    return [*texts, first["kept_ratio"], first["fallback"], float(np.mean(first["rewards"]))]


def _to_tensorboard(writer: Any, table: list[list[Any]], pictures: dict[str, Image.Image], step: int) -> None:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *table]
    cells = [
        [str(cell).replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>") for cell in line] for line in lines
    ]
    writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
    for place, picture in enumerate(pictures.values()):
        writer.add_image(f"samples/{place}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
