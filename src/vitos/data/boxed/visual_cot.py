"""JSON lines as Visual-CoT has them: `question`, `answer`, `image`, `bboxs`; `possible_answers` are accepted as well.

`width` and `height` are the size that the boxes are pixels of; without them it is that of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.data.boxed import Annotations, Marked
from vitos.data.images import DataError


def read(source: Path, images: Path | None = None) -> Annotations:
    """One file, or all `*.jsonl` of a folder; `image` lies below `images`, or beside the file."""
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise DataError(f"{source}: no .jsonl file there; name the file with questions and boxes")
    return Annotations((), {file.stem: _marked(file, images or file.parent) for file in files})


def _marked(file: Path, images: Path) -> Iterator[Marked]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{file.name}, line {number}"
        try:
            item: Any = json.loads(line)
            marks = [(where, "evidence", [float(edge) for edge in box]) for box in item["bboxs"]]
            size = (float(item["width"]), float(item["height"])) if item.get("width") else None
            asked: dict[str, Any] = {
                "question": f"{IMAGE_PLACEHOLDER}{item['question']}",
                "answer": item["answer"],
                "kind": "text",
            }
            others = [text for text in item.get("possible_answers", ()) if text != item["answer"]]
            asked |= {"accepted": others or None, "category": "evidence"}
            yield Marked(name=where, path=images / item["image"], marks=marks, size=size, asked=asked)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: needs question, answer, image and bboxs ({error!r})") from error
