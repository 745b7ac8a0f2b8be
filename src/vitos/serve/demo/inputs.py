"""What a person gives the demo: a file and which picture of it, a question, boxes. Errors are whole sentences."""

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
"""Longest side of a shown picture in pixels; larger ones are scaled down, but the model sees the file as it is."""
ENDINGS = (".nii.gz", ".nii", ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Endings of names that files keep on the disk; only those of NIfTI and DICOM matter to how a file is read."""
MAX_BOXES = 32
MAX_QUESTION = 4000
EXAMPLE_SEED = 77
"""Seed in the validation split, so that no scene occurs in the training or the test of a model of this package."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture and a question about it.

    Attributes:
        image: the file.
        icon: file of a small picture that a browser can show.
        question: the question with its options.
        answer: letter of the right option.
        part: frame or slice of the file, as the page's field takes it.
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
    """Write phantom pictures and ask about them, the kinds of question taking turns."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for index, (_, scene, question) in enumerate(samples("val", count, EXAMPLE_SEED)):
        path = folder / f"example-{index + 1}.png"
        render(scene).save(path)
        text = question.full_text.removeprefix(IMAGE_PLACEHOLDER)
        out.append(Example(image=path, icon=path, question=text, answer=question.answer))
    return out


def record_examples(sources: Sequence[Path], folder: Path, count: int = 6) -> list[Example]:
    """Questions of record files, the files taking turns; of questions that differ in numbers alone, only the first.

    Their images are copied into `folder`, from which the page serves them, without their names: these may say who a
    patient is.

    Raises:
        DataError: from `read_records`, for an image that cannot be read, or if no question is about a single image.
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
        raise DataError(f"{', '.join(map(str, sources))}: no question about a single image; name a file that has one")
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for number, record in enumerate(records, start=1):
        path, part = split_name(record.image_paths[0])
        image, icon = folder / f"example-{number}{file_ending(path)}", folder / f"icon-{number}.png"
        try:
            picture = load_image(record.image_paths[0])
        except ImageError as error:
            raise DataError(f"{record.id}: {error}") from error
        picture.thumbnail((64, 64))
        picture.save(icon)
        shutil.copyfile(path, image)
        text = record.question.replace(IMAGE_PLACEHOLDER, "")
        out.append(Example(image=image, icon=icon, question=text, answer=record.answer, part=part))
    return out


def checked_question(text: str) -> str:
    """The question without image placeholders and surrounding space.

    Raises:
        ValueError: if it is empty or too long.
    """
    text = (text or "").replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise ValueError("Write a question first.")
    if len(text) > MAX_QUESTION:
        raise ValueError(f"The question has {len(text)} characters; at most {MAX_QUESTION} are read here.")
    return text


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRange:
    """Range of the sliders for the window, in the file's values: Hounsfield units for CT.

    Attributes:
        window: (centre, width) of the file itself.
        low, high: smallest and largest centre.
        widest: largest width; the smallest is 1.
    """

    window: tuple[float, float]
    low: float
    high: float
    widest: float

    @property
    def step(self) -> float:
        """Step of both sliders: 1, or less if the values span fewer than a hundred."""
        return 1.0 if self.widest >= 100 else self.widest / 100

    def chosen(self, centre: float, width: float) -> tuple[float, float] | None:
        """The window of the sliders within their range; None: the file's own, up to the rounding of their steps."""
        if abs(centre - self.window[0]) < self.step and abs(width - self.window[1]) < self.step:
            return None
        return min(max(centre, self.low), self.high), min(max(width, 1.0), self.widest)


def window_range(facts: ImageFacts) -> WindowRange | None:
    """Range of the sliders around the window that an image was opened with; None: it has none (colour, 8 bit).

    If that window is the range of the image's values, the sliders end there. If the file names a window, its values
    may reach much further, so the centre moves by twice its width, and by at least 1,000, as from bone to lung.
    """
    if facts.rendering.window is None:
        return None
    centre, width = facts.rendering.window[0], max(1.0, facts.rendering.window[1])
    reach = width / 2 if facts.rendering.window_source == "range" else max(2 * width, 1000.0)
    return WindowRange(window=(centre, width), low=centre - reach, high=centre + reach, widest=2 * reach)


def open_image(name: Path) -> tuple[Image.Image, ImageFacts]:
    """The picture of a file.

    Raises:
        ValueError: if it cannot be used; the message names the file without its folder.
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
        ValueError: if `part` is no selector, or crops the image, which the boxes of the page would not fit.
    """
    part = (part or "").strip().removeprefix("#")
    chosen = parse_selector(part)
    if chosen.crop is not None:
        raise ValueError("A crop is not shown here; draw a box instead.")
    pairs = [part] if part else []
    if window is not None and chosen.window is None:
        pairs.append(f"window={window[0]:g},{window[1]:g}")
    return Path(f"{file}#{'&'.join(pairs)}") if pairs else Path(file)


def file_ending(path: Path) -> str:
    """The ending of a file's name if it is one of `ENDINGS`, which tell nothing about a patient; otherwise empty."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")


def may_have_parts(file: str | Path) -> bool:
    """Whether a file is DICOM or NIfTI, of which one frame or slice is shown."""
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
    """Boxes as a person writes them: `x1, y1, x2, y2` in fractions of the image, one per line.

    Raises:
        ValueError: for a line that is no box, which the message names, or too many boxes.
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
    """The boxes in those lines that are complete, while a person is still writing."""
    boxes: list[Box] = []
    for line in (text or "").splitlines():
        with suppress(ValueError):
            boxes += parse_boxes(line)
    return tuple(boxes[:MAX_BOXES])


def format_boxes(boxes: Sequence[Box]) -> str:
    """The inverse of `parse_boxes`, with three decimals; a box that these would flatten keeps all its decimals."""
    lines = []
    for box in boxes:
        x1, y1, x2, y2 = (round(v, 3) for v in box.as_tuple())
        numbers = (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else box.as_tuple()
        lines.append(", ".join(f"{v:g}" for v in numbers))
    return "\n".join(lines)


def box_between(first: Point, second: Point) -> Box:
    """The box between two opposite corners, in fractions; what lies outside the image is cut off.

    Raises:
        ValueError: if the box has no area.
    """
    (x1, x2), (y1, y2) = (sorted(min(max(v, 0.0), 1.0) for v in pair) for pair in zip(first, second, strict=True))
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        raise ValueError("The two corners of a box must differ in both directions.")
    return Box(x1, y1, x2, y2)
