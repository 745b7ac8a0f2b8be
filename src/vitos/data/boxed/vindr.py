"""A CSV with a row per box, as VinDr-CXR: `image_id`, `class_name`, `x_min`, `y_min`, `x_max`, `y_max` in pixels.

Rows without numbers say that nothing was found. `rad_id` names the reader: boxes of one finding by different readers
whose IoU is a half or more are averaged, or one finding would be three. With `width` and `height` the numbers are
pixels of an image of that size, as in resized releases.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vitos.core.geometry import Box
from vitos.data.boxed import Annotations, Marked, boxed, find_pictures
from vitos.data.images import DataError, load_image

COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
SAME = 0.5


def read(source: Path, images: Path | None = None) -> Annotations:
    """One split with the name of the file; the images are named as `image_id` says, with any suffix."""
    pictures = find_pictures(images or source.parent / "images")
    by_image: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if lost := set(COLUMNS) - set(reader.fieldnames or ()):
            raise DataError(f"{source}: has no column {min(lost)}; it needs {', '.join(COLUMNS)}")
        for row in reader:
            by_image[row["image_id"]].append((f"{source.name}, line {reader.line_num}", row))
    if lost := set(by_image) - set(pictures):
        raise DataError(f"{source}: there is no image {min(lost)}; name the folder of images with --images")
    names = sorted({row["class_name"] for rows in by_image.values() for _, row in rows if row["x_min"]})
    return Annotations(names, {source.stem: (_marked(pictures[key], rows) for key, rows in by_image.items())})


def _marked(path: Path, rows: Sequence[tuple[str, dict[str, str]]]) -> Marked:
    size: tuple[float, float] = load_image(path).size
    found: dict[str, list[tuple[str, str, Box]]] = defaultdict(list)
    for where, row in rows:
        try:
            if row.get("width") and row.get("height"):
                size = (float(row["width"]), float(row["height"]))
            if any(row[name] for name in COLUMNS[2:]):
                box = boxed(where, [float(row[name]) for name in COLUMNS[2:]], size)
                found[row["class_name"]].append((row.get("rad_id") or where, where, box))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    marks = [(where, category, edges) for category, boxes in found.items() for where, edges in agreed(boxes, size)]
    return Marked(name=path.name, path=path, marks=marks, size=size)


def agreed(boxes: Sequence[tuple[str, str, Box]], size: tuple[float, float]) -> Iterator[tuple[str, Sequence[float]]]:
    """Boxes (reader, line, box) of one finding; those of different readers around the same place are averaged."""
    groups: list[list[tuple[str, str, Box]]] = []
    for reader, where, box in boxes:
        same = (g for g in groups if all(reader != other and box.iou(drawn) >= SAME for other, _, drawn in g))
        if (group := next(same, None)) is None:
            groups.append(group := [])
        group.append((reader, where, box))
    for group in groups:
        mean = np.mean([box.as_tuple() for *_, box in group], axis=0)
        yield group[0][1], (mean * [*size, *size]).tolist()
