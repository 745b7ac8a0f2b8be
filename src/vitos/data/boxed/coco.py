"""COCO detection files, one per split: `images`, `annotations` with `bbox` [x, y, width, height], `categories`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitos.core.record import Record
from vitos.data.boxed import Annotations, Marked, annotated
from vitos.data.convert import ImageStore
from vitos.data.files import write_json_atomic
from vitos.data.images import DataError


def read(source: Path, images: Path | None = None) -> Annotations:
    """One file, or all `*.json` of a folder; images lie below `images`, or `images/` beside the file, or beside it."""
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: no .json file there; name the COCO file")
    beside = files[0].parent / "images"
    root = images or (beside if beside.is_dir() else files[0].parent)
    names: dict[str, None] = {}
    splits = {file.stem: _marked(file, root, names) for file in files}
    return Annotations([*names], splits)


def _marked(file: Path, root: Path, names: dict[str, None]) -> list[Marked]:
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        categories = {category["id"]: str(category["name"]) for category in data["categories"]}
        marks: dict[Any, list[tuple[str, str, tuple[float, ...]]]] = defaultdict(list)
        for found in data["annotations"]:
            x, y, w, h = found["bbox"]
            where = f"{file.name}, annotation {found['id']}"
            marks[found["image_id"]].append((where, categories[found["category_id"]], (x, y, x + w, y + h)))
        rows = [(image["id"], image["file_name"], image.get("width"), image.get("height")) for image in data["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a COCO detection file ({error!r}); export it again") from error
    if lost := set(marks) - {row[0] for row in rows}:
        raise DataError(f"{file}: annotations name image {lost.pop()}, which is not in `images`; export it again")
    names.update(dict.fromkeys(categories.values()))
    return [
        Marked(name=f"{file.name}, image {key}", path=root / name, marks=marks[key], size=(w, h) if w and h else None)
        for key, name, w, h in rows
    ]


def write(records: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Write `<split>.json` for each split and `images/`; category ids count from 1 and are the same for all splits."""
    store = ImageStore(folder)
    splits = {split: annotated(found, store) for split, found in records.items()}
    names = {category for split in splits.values() for _, marks in split.values() for category, _ in marks}
    ids = {name: number for number, name in enumerate(sorted(names), 1)}
    for split, pictures in splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for key, (name, ((width, height), marks)) in enumerate(pictures.items(), 1):
            images.append({"id": key, "file_name": Path(name).name, "width": width, "height": height})
            for category, box in marks:
                w, h = (box.x2 - box.x1) * width, (box.y2 - box.y1) * height
                row = {"id": len(annotations) + 1, "image_id": key, "category_id": ids[category], "iscrowd": 0}
                annotations.append(row | {"bbox": [box.x1 * width, box.y1 * height, w, h], "area": w * h})
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        write_json_atomic(
            folder / f"{split}.json", {"images": images, "annotations": annotations, "categories": categories}
        )
