"""Boxed annotations of other programs → records with questions, and back: COCO, YOLO, masks, VinDr-CXR, Visual-CoT.

A format is a file of this folder, or an entry point of `vitos.boxed`, with `read(source, images) -> Annotations`, and
with `write(records, folder)` where there is a way back. What is converted has passed the checks of `vitos data check`.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vitos.core.geometry import Box
from vitos.core.options import option_lines
from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.core.registry import Registry
from vitos.data.convert import ImageStore, Row, image_suffix, write_rows, written
from vitos.data.images import DataError, ImageError, load_image
from vitos.data.picture import split_name
from vitos.data.readers import read_records, record_files

FORMATS = Registry("vitos.data.boxed", "vitos.boxed")
NOTHING = "no finding"
OUTSIDE = 1.0
"""Pixels by which a box may leave its image, since annotation tools round; it is cut there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """An image with its boxes.

    Attributes:
        name: how errors name it.
        path: the file.
        marks: (how errors name the box, category, x1, y1, x2, y2) of each box.
        size: width and height that the numbers refer to; None: those of the file.
        asked: question and answer where the annotations have them; by default each category is asked for.
    """

    name: str
    path: Path
    marks: Sequence[tuple[str, str, Sequence[float]]]
    size: tuple[float, float] | None = None
    asked: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Annotations:
    """All categories, and split → images."""

    categories: Sequence[str]
    splits: Mapping[str, Iterable[Marked]]


def convert_boxed(source: Path, target: Path, read: str | None, write: str | None, images: Path | None = None) -> int:
    """Convert annotations to records (`read`) or records to annotations (`write`); returns the number of questions.

    Raises:
        ValueError: for an unknown format or one that is not written, or unless one of `read` and `write` is given.
        DataError: for what cannot be converted, named, or a target that is not empty; nothing is left behind.
    """
    if (read is None) == (write is None):
        raise ValueError("name one format, to read (--from) or to write (--to); convert to records in between")
    if read is not None:
        found = FORMATS.module(read).read(source, images)
        rows = {split: _rows(marked, found.categories) for split, marked in found.splits.items()}
        return written(target, lambda partial: write_rows(rows, partial, None))
    if not hasattr(module := FORMATS.module(str(write)), "write"):
        raise ValueError(f"{write} can be read only; write coco or yolo")
    records = {file.stem: read_records(file) for file in record_files(source)}
    return written(target, lambda partial: module.write(records, partial) or sum(map(len, records.values())))


def _rows(images: Iterable[Marked], categories: Sequence[str]) -> Iterator[tuple[str, Row]]:
    for image in images:
        picture, size = open_picture(image.path)
        frame = image.size or size
        if abs(frame[0] * size[1] / (frame[1] * size[0]) - 1) > 0.02:
            problem = f"is {size[0]} x {size[1]} pixels, but was annotated as {frame[0]:g} x {frame[1]:g}"
            raise DataError(f"{image.name}: {problem}; look whether it was turned or cut")
        boxes: dict[str, list[Box]] = {}
        for where, category, edges in image.marks:
            boxes.setdefault(category, []).append(boxed(where, edges, frame))
        asked: Iterable[Row] = [image.asked] if image.asked else questions(image.name, list(boxes), categories)
        for row in asked:
            evidence = boxes.get(row.get("category", ""), [])
            yield image.name, {**picture, **row, "bbox": [box.to_json() for box in evidence] or None}


def questions(name: str, shown: Sequence[str], categories: Sequence[str]) -> Iterator[Row]:
    """For each category that an image shows, which of four it shows; the others are drawn by the names alone.

    >>> (row,) = questions("1.png", ["mass"], ["mass", "cyst"])
    >>> row["answer"], row["question"].splitlines()[1:]
    ('A', ['A. mass', 'B. cyst', 'C. no finding'])
    """
    for right in sorted(shown) or [NOTHING]:
        rng = random.Random(f"{name}/{right}")
        others = sorted({*categories, NOTHING} - {*shown, right})
        options = [right, *rng.sample(others, min(3, len(others)))]
        rng.shuffle(options)
        text = f"{IMAGE_PLACEHOLDER}Which of these does the image show?{option_lines(options)}"
        yield {"question": text, "answer": ascii_uppercase[options.index(right)], "category": right}


def boxed(name: str, edges: Sequence[float], size: tuple[float, float]) -> Box:
    """The box of x1, y1, x2, y2 in pixels of an upright image of `size` (width, height).

    Raises:
        DataError: if it is empty, or leaves the image by more than OUTSIDE.
    """
    if any(not -OUTSIDE <= edge <= limit + OUTSIDE for edge, limit in zip(edges, (*size, *size), strict=True)):
        remedy = "mend it, or look whether the image was resized or turned after it was annotated"
        raise DataError(
            f"{name}: the box {list(edges)} leaves its image of {size[0]:g} x {size[1]:g} pixels; {remedy}"
        )
    x1, y1, x2, y2 = (min(max(edge / limit, 0.0), 1.0) for edge, limit in zip(edges, (*size, *size), strict=True))
    try:
        return Box(x1, y1, x2, y2)
    except ValueError as error:
        raise DataError(f"{name}: the box {list(edges)} is empty; remove or mend it") from error


def open_picture(path: Path) -> tuple[Row, tuple[int, int]]:
    """The image of a row, with its width and height; DICOM and the like become PNG. An ImageError if it is broken."""
    picture, data = load_image(path), path.read_bytes()
    try:
        image_suffix(data, path)
    except ImageError:
        picture.save(buffer := io.BytesIO(), "PNG")
        data = buffer.getvalue()
    return {"image": {"bytes": data, "path": path.name}}, picture.size


def find_pictures(folder: Path) -> dict[str, Path]:
    """Stem → file of all files below a folder, or a DataError if there is none."""
    found = {file.stem: file for file in sorted(folder.rglob("*")) if file.is_file()}
    if not found:
        raise DataError(f"{folder}: there are no images; name their folder with --images")
    return found


def annotated(records: Iterable[Record], store: ImageStore) -> dict[str, tuple[tuple[int, int], dict[Any, None]]]:
    """Image file → its width and height, and the distinct (category, box) of all records about it, in their order.

    The category is the record's `meta.category`, or the text of the right answer.
    """
    found: dict[str, tuple[tuple[int, int], dict[Any, None]]] = {}
    for record in records:
        if len(record.image_paths) != 1 or split_name(record.image_paths[0])[1]:
            raise DataError(f"{record.id}: it has several images, or a part of a file; this format wants one picture")
        picture, size = open_picture(record.image_paths[0])
        name = store.add(picture["image"]["bytes"], record.id)
        category = record.meta.get("category") or record.options.get(record.answer, record.answer)
        found.setdefault(name, (size, {}))[1].update(dict.fromkeys((category, box) for box in record.boxes or ()))
    return found
