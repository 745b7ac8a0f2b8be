"""What a person gives the demo: a file and which picture of it, a question, boxes. Errors are sentences."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

from PIL import Image

from vitos.core.geometry import Box
from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.data.dicom import is_dicom
from vitos.data.images import DataError, ImageError, ImageFacts, load_image, load_image_facts
from vitos.data.nifti import is_nifti
from vitos.data.phantom import render, samples
from vitos.data.picture import parse_selector, split_name
from vitos.data.readers import read_records

LONGEST_SIDE = 1024
"""Pixels: larger pictures are scaled down before they are drawn on; the model sees the file as it is."""
MAX_BOXES = 32
MAX_QUESTION = 4000
EXAMPLE_SEED = 77
"""Of the validation split: no scene that a model of this package was trained on or is tested with."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, a question with its options, and the letter of the right one.

    Attributes:
        image: the file.
        icon: a small picture that a browser can show.
        part: of the file, as the page's field takes it.
    """

    image: Path
    icon: Path
    question: str
    answer: str
    part: str = ""

    @property
    def title(self) -> str:
        """The question's first sentence, without its options."""
        return re.split(r"(?<=\?)\s", self.question.splitlines()[0])[0]


def draw_examples(folder: Path, count: int = 5) -> list[Example]:
    """Write phantom pictures, one for each kind of question in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for index, (_, scene, question) in enumerate(samples("val", count, EXAMPLE_SEED)):
        path = folder / f"example-{index + 1}.png"
        render(scene).save(path)
        out.append(Example(path, path, question.full_text.removeprefix(IMAGE_PLACEHOLDER), question.answer))
    return out


def record_examples(sources: Sequence[Path], folder: Path, count: int = 6) -> list[Example]:
    """Questions of record files, from each file in turn, no two of the same words (numbers do not count).

    Their images are copied into `folder`, from which the page serves them.

    Raises:
        DataError: from `read_records`, for an image that cannot be read, or where no question has one image.
    """
    kinds = []
    for source in sources:
        own: dict[str, Record] = {}
        for record in read_records(source):
            if len(record.image_paths) == 1:
                own.setdefault(re.sub(r"\d+", "", record.question.splitlines()[0]), record)
        kinds.append(list(own.values()))
    records = list(islice(filter(None, chain.from_iterable(zip_longest(*kinds))), count))
    if not records:
        raise DataError(f"{', '.join(map(str, sources))}: no question about a single image")
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for number, record in enumerate(records, start=1):
        path, part = split_name(record.image_paths[0])
        image, icon = folder / f"example-{number}-{path.name}", folder / f"icon-{number}.png"
        try:
            picture = load_image(record.image_paths[0])
        except ImageError as error:
            raise DataError(f"{record.id}: {error}") from error
        picture.thumbnail((64, 64))
        picture.save(icon)
        shutil.copyfile(path, image)
        out.append(Example(image, icon, record.question.replace(IMAGE_PLACEHOLDER, ""), record.answer, part))
    return out


def checked_question(text: str) -> str:
    """The question without placeholders of images and the space around it.

    Raises:
        ValueError: if there is none, or it is too long.
    """
    text = (text or "").replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise ValueError("Write a question first.")
    if len(text) > MAX_QUESTION:
        raise ValueError(f"The question has {len(text)} characters; at most {MAX_QUESTION} are read here.")
    return text


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WindowRange:
    """What the window's sliders may be set to, in the file's values: Hounsfield units for CT.

    Attributes:
        window: (centre, width) of the file itself.
        low, high: of the centre.
        widest: of the width, which begins at 1.
    """

    window: tuple[float, float]
    low: float
    high: float
    widest: float

    @property
    def step(self) -> float:
        """Of both sliders: whole numbers, unless the values span fewer than a hundred."""
        return 1.0 if self.widest >= 100 else self.widest / 100

    def clipped(self, centre: float, width: float) -> tuple[float, float]:
        """The nearest window that the sliders can be set to."""
        return min(max(centre, self.low), self.high), min(max(width, 1.0), self.widest)

    def is_own(self, centre: float, width: float) -> bool:
        """Sliders stand where they were put: on the file's window, but for what their steps round away."""
        return abs(centre - self.window[0]) < self.step and abs(width - self.window[1]) < self.step


def window_range(facts: ImageFacts) -> WindowRange | None:
    """Sliders around the window that an image was opened with; None where it has none (colour, 8 bit).

    Where that is the range of the values, the sliders end there. Where the file names a window, its values may reach
    much further, so they go twice its width to either side, and at least 1,000, as from bone to lung.
    """
    rendering = facts.rendering
    if rendering.window is None:
        return None
    centre, width = rendering.window
    width = max(1.0, width)
    if rendering.window_source == "range":
        return WindowRange((centre, width), centre - width / 2, centre + width / 2, width)
    reach = max(2 * width, 1000.0)
    return WindowRange((centre, width), centre - reach, centre + reach, 2 * reach)


def open_image(name: Path) -> tuple[Image.Image, ImageFacts]:
    """The picture of a file.

    Raises:
        ValueError: it cannot be used; the message names the file without its folder.
    """
    try:
        return load_image_facts(name)
    except ImageError as error:
        raise ValueError(f"{name.name}: {error.reason}") from error


def image_name(file: str | Path, part: str = "", window: tuple[float, float] | None = None) -> Path:
    """A file's name with its selector.

    Args:
        part: `frame=3`, or `axis=2&slice=40`; may be empty.
        window: (centre, width); None: the file's own.

    Raises:
        ValueError: if `part` is no selector, or crops, which boxes here would not fit.
    """
    part = (part or "").strip().removeprefix("#")
    chosen = parse_selector(part)
    if chosen.crop is not None:
        raise ValueError("A crop is not shown here; draw a box instead.")
    pairs = [part] if part else []
    if window is not None and chosen.window is None:
        pairs.append(f"window={window[0]:g},{window[1]:g}")
    return Path(f"{file}#{'&'.join(pairs)}") if pairs else Path(file)


def may_have_parts(file: str | Path) -> bool:
    """A DICOM or NIfTI file, of which one frame or slice is looked at."""
    path = Path(file)
    with path.open("rb") as opened:
        return is_nifti(path) or is_dicom(opened.read(132))


def fitting(picture: Image.Image) -> Image.Image:
    """The picture, its longer side at most `LONGEST_SIDE` pixels."""
    if max(picture.size) <= LONGEST_SIDE:
        return picture
    smaller = picture.copy()
    smaller.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return smaller


# --- boxes ----------------------------------------------------------------------------------------------------------


def parse_boxes(text: str) -> tuple[Box, ...]:
    """Boxes as a person writes them: `x1, y1, x2, y2` in fractions of the image, a line each.

    Raises:
        ValueError: names the line and what is wrong with it.
    """
    boxes = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip(" \t,;[]"):
            continue
        try:
            x1, y1, x2, y2 = map(float, line.strip(" \t,;[]").replace(",", " ").split())
        except ValueError:
            raise ValueError(f"Box {number} is not four numbers; write x1, y1, x2, y2, each from 0 to 1.") from None
        try:
            boxes.append(Box(x1, y1, x2, y2))
        except ValueError:
            raise ValueError(
                f"Box {number} does not lie in the image; write x1, y1, x2, y2 from 0 to 1 with x1 < x2 and y1 < y2."
            ) from None
    if len(boxes) > MAX_BOXES:
        raise ValueError(f"{len(boxes)} boxes; at most {MAX_BOXES} are used.")
    return tuple(boxes)


def readable_boxes(text: str) -> tuple[Box, ...]:
    """Those lines of `parse_boxes` that are boxes already, while a person is still writing."""
    boxes: list[Box] = []
    for line in (text or "").splitlines():
        with suppress(ValueError):
            boxes += parse_boxes(line)
    return tuple(boxes[:MAX_BOXES])


def format_boxes(boxes: Sequence[Box]) -> str:
    """The inverse of `parse_boxes`, with three decimals; a box that these would flatten keeps all of them."""
    lines = []
    for box in boxes:
        x1, y1, x2, y2 = (round(v, 3) for v in box.as_tuple())
        numbers = (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else box.as_tuple()
        lines.append(", ".join(f"{v:g}" for v in numbers))
    return "\n".join(lines)


def box_between(first: Point, second: Point) -> Box:
    """The box whose opposite corners are two points, in fractions; what lies outside the image is cut off.

    Raises:
        ValueError: if the points span no area.
    """
    (x1, x2), (y1, y2) = (sorted(min(max(v, 0.0), 1.0) for v in pair) for pair in zip(first, second, strict=True))
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        raise ValueError("The two corners of a box must differ in both directions.")
    return Box(x1, y1, x2, y2)
