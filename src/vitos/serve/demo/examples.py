"""The examples of the demo's page: drawn phantoms, or questions of record files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.data.images import DataError, ImageError, load_image
from vitos.data.phantom import render, samples
from vitos.data.picture import parse_selector, split_name
from vitos.data.readers import read_records
from vitos.serve.demo.inputs import file_ending
from vitos.serve.demo.stack import MAX_PICTURES

EXAMPLE_SEED = 77
"""Seed in the validation split, so that no scene occurs in the training or the test of a model of this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One or several pictures and a question about them.

    Attributes:
        images: names of the pictures, with selectors.
        icon: file of a small picture that a browser can show.
        question: the question with its options; about several images with one `<image>` each.
        answer: letter of the right option.
    """

    images: tuple[Path, ...]
    icon: Path
    question: str
    answer: str

    @property
    def image(self) -> Path:
        """Name of the first picture."""
        return self.images[0]

    @property
    def title(self) -> str:
        """The question's first sentence, without its options and the lines of its images."""
        lines = [line.split(IMAGE_PLACEHOLDER)[-1].strip() for line in self.question.splitlines()]
        return re.split(r"(?<=\?)\s", next(filter(None, lines), ""))[0]


def draw_examples(folder: Path, count: int = 5) -> list[Example]:
    """Write phantom pictures and ask about them, the kinds of question taking turns."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for index, (_, scene, question) in enumerate(samples("val", count, EXAMPLE_SEED)):
        path = folder / f"example-{index + 1}.png"
        render(scene).save(path)
        text = question.full_text.removeprefix(IMAGE_PLACEHOLDER)
        out.append(Example(images=(path,), icon=path, question=text, answer=question.answer))
    return out


def record_examples(sources: Sequence[Path], folder: Path, count: int = 6) -> list[Example]:
    """Questions of record files, the files taking turns; of questions that differ in numbers alone, only the first.

    Their images are copied into `folder`, from which the page serves them, without their names: these may say who a
    patient is.

    Raises:
        DataError: from `read_records`, for an image that cannot be read, or if no question can be shown.
    """
    kinds = []
    for source in sources:
        own: dict[str, Record] = {}
        for record in read_records(source):
            if _can_be_shown(record):
                own.setdefault(re.sub(r"\d+", "", record.question), record)
        kinds.append(list(own.values()))
    records = list(islice(filter(None, chain.from_iterable(zip_longest(*kinds))), count))
    if not records:
        what = f"no question about 1 to {MAX_PICTURES} whole images"
        raise DataError(f"{', '.join(map(str, sources))}: {what}; name a file that has one")
    folder.mkdir(parents=True, exist_ok=True)
    return [_copied(record, folder, number) for number, record in enumerate(records, start=1)]


def _can_be_shown(record: Record) -> bool:
    """Whether its images are few and whole; boxes of the page would not fit a crop."""
    crops = [parse_selector(split_name(path)[1]).crop for path in record.image_paths]
    return 1 <= len(crops) <= MAX_PICTURES and not any(crops)


def _copied(record: Record, folder: Path, number: int) -> Example:
    names: dict[Path, Path] = {}
    images = []
    icon = folder / f"icon-{number}.png"
    for path, part in map(split_name, record.image_paths):
        if path not in names:
            mark = f"-{len(names) + 1}" if len(record.image_paths) > 1 else ""
            names[path] = folder / f"example-{number}{mark}{file_ending(path)}"
        images.append(Path(f"{names[path]}#{part}") if part else names[path])
    try:
        picture = load_image(record.image_paths[0])
    except ImageError as error:
        raise DataError(f"{record.id}: {error}") from error
    picture.thumbnail((64, 64))
    picture.save(icon)
    for path, copy in names.items():
        shutil.copyfile(path, copy)
    question = record.question if len(images) > 1 else record.question.replace(IMAGE_PLACEHOLDER, "")
    return Example(images=tuple(images), icon=icon, question=question, answer=record.answer)
