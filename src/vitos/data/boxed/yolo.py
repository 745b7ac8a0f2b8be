"""Data sets of Ultralytics YOLO: `data.yaml`, and a text file of labels for each image.

A label is `category x y width height` (centre and size in 0..1), or `category x1 y1 x2 y2 x3 y3 …`, a polygon, whose
surrounding box is taken. The labels of `…/images/…/1.png` are in `…/labels/…/1.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vitos.core.record import Record
from vitos.data.boxed import Annotations, Marked, annotated, find_pictures
from vitos.data.convert import ImageStore
from vitos.data.images import DataError, load_image

SPLITS = ("train", "val", "test")


def read(source: Path, images: Path | None = None) -> Annotations:
    """A `data.yaml` or its folder; the splits are below `images`, or `path` of the file, or beside the file."""
    file = source / "data.yaml" if source.is_dir() else source
    try:
        data: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = data["names"] if isinstance(data["names"], dict) else dict(enumerate(data["names"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{file}: no data.yaml with `names` ({error!r})") from error
    given = file.parent / str(data.get("path", "."))
    root = images or (given if given.is_dir() else file.parent)
    splits = {split: find_pictures(root / str(data[split])) for split in SPLITS if data.get(split)}
    if not splits:
        raise DataError(f"{file}: names none of the splits {', '.join(SPLITS)}")
    return Annotations(
        [*names.values()],
        {split: (_marked(path, names) for path in found.values()) for split, found in splits.items()},
    )


def _marked(path: Path, names: Mapping[int, str]) -> Marked:
    before, images, after = str(path).rpartition("/images/")
    labels = Path(f"{before}/labels/{after}").with_suffix(".txt")
    if not images:
        raise DataError(f"{path}: is not below a folder `images`, beside which YOLO has `labels`")
    lines = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else []
    width, height = load_image(path).size
    marks = [
        (where, category, (x1 * width, y1 * height, x2 * width, y2 * height))
        for where, category, (x1, y1, x2, y2) in _labels(str(labels), lines, names)
    ]
    return Marked(name=path.name, path=path, marks=marks)


def _labels(file: str, lines: Sequence[str], names: Mapping[int, str]) -> Iterator[tuple[str, str, Sequence[float]]]:
    for number, words in enumerate(map(str.split, lines), 1):
        if not words:
            continue
        try:
            category, (x, y, *more) = names[int(words[0])], map(float, words[1:])
            if len(more) == 2:
                edges = [x - more[0] / 2, y - more[1] / 2, x + more[0] / 2, y + more[1] / 2]
            else:
                xs, ys = [x, *more[::2]], [y, *more[1::2]]
                if len(xs) != len(ys) or len(xs) < 3:
                    raise ValueError(f"{len(words) - 1} numbers")
                edges = [min(xs), min(ys), max(xs), max(ys)]
        except (ValueError, KeyError) as error:
            raise DataError(
                f"{file}, line {number}: no category of data.yaml with a box or polygon ({error!r})"
            ) from error
        yield f"{file}, line {number}", category, edges


def write(records: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Write `data.yaml`, `<split>/images/` and `<split>/labels/`; the splits are train, val and test."""
    if unknown := sorted(set(records) - set(SPLITS)):
        raise DataError(f"{unknown[0]}.json: YOLO has the splits {', '.join(SPLITS)} only; rename the file")
    splits = {}
    for split, found in records.items():
        (folder / split / "labels").mkdir(parents=True)
        splits[split] = annotated(found, ImageStore(folder / split))
    names = sorted({category for split in splits.values() for _, marks in split.values() for category, _ in marks})
    for split, pictures in splits.items():
        for image, (_, marks) in pictures.items():
            lines = [
                f"{names.index(name)} {(b.x1 + b.x2) / 2} {(b.y1 + b.y2) / 2} {b.x2 - b.x1} {b.y2 - b.y1}\n"
                for name, b in marks
            ]
            labels = folder / split / "labels" / Path(image).with_suffix(".txt").name
            labels.write_text("".join(lines), encoding="utf-8")
    data = {split: f"{split}/images" for split in records} | {"names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
