"""The supervised targets as chat JSON, for LLaMA-Factory and ms-swift: `vitos data export`.

Each exercise of `lessons.py` becomes one conversation: the user's message with its `<image>` placeholders, and the
answer to be learned. Boxes are in the model's own convention, written for the size that its image processor gives the
picture: the other program must use the same limits of pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.data.files import atomic_folder
from vitos.data.images import load_image
from vitos.policy.plans.dense import Dense
from vitos.policy.vlm import SparseVLM
from vitos.rl.lessons import record_lesson
from vitos.scans.store import ScanStore

Rows = list[dict[str, Any]]
DATASET = "vitos"


def _llamafactory(rows: Rows) -> dict[str, str]:
    """One JSON list, and the file in which LLaMA-Factory looks a data set up (`dataset_dir: FOLDER`)."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {
        DATASET: {
            "file_name": f"{DATASET}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": tags,
        }
    }
    return {f"{DATASET}.json": json.dumps(rows, indent=1), "dataset_info.json": json.dumps(info, indent=1)}


def _ms_swift(rows: Rows) -> dict[str, str]:
    """One JSON object a line (`--dataset vitos.jsonl`, from inside the folder)."""
    return {f"{DATASET}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


FORMATS: Mapping[str, Callable[[Rows], dict[str, str]]] = {"llamafactory": _llamafactory, "ms-swift": _ms_swift}
"""The formats, each a function from conversations to the texts of its files."""


def export_chat(
    policy: SparseVLM,
    records: Sequence[Record],
    folder: Path,
    form: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the targets of records into a new folder, with their pictures as PNG files; returns the number of targets.

    Pictures are written as the model sees them before resizing: upright, 8-bit RGB, frames, windows and crops applied.
    Each distinct picture is written once, and named in the conversations relative to the folder.

    Args:
        policy: the model whose prompts and coordinates are used.
        records: the questions with their answers and boxes.
        folder: a folder that does not exist yet.
        form: a key of `FORMATS`.
        progress: called with the number of records done and of all.

    Raises:
        FileExistsError: if the folder exists.
        ValueError: for an unknown format, or a record whose question does not place its images.
    """
    if form not in FORMATS:
        raise ValueError(f"{form!r} is not a format; choose one of {', '.join(FORMATS)}")
    store, names, rows = ScanStore(policy, plan=Dense("dense")), dict[Path, str](), Rows()
    with atomic_folder(folder) as staging:
        (staging / "images").mkdir()
        for done, record in enumerate(records, start=1):
            for path in record.image_paths:
                if path not in names:
                    names[path] = f"images/{len(names):06d}.png"
                    load_image(path).save(staging / names[path])
            (scan,) = store.get([record])
            lesson = record_lesson(record, scan.visuals, policy.backbone, policy.spec)
            images = [names[path] for path in record.image_paths]
            for exercise in lesson.exercises:
                if exercise.text.count(IMAGE_PLACEHOLDER) != len(images):
                    raise ValueError(
                        f"{record.id}: the question has {exercise.text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} "
                        f"for {len(images)} images; other programs need one for each"
                    )
                messages = [("user", exercise.text), ("assistant", exercise.target)]
                turns = [{"role": role, "content": content} for role, content in messages]
                rows.append({"messages": turns, "images": images})
            progress(done, len(records))
        for name, text in FORMATS[form](rows).items():
            (staging / name).write_text(text, encoding="utf-8")
    return len(rows)
