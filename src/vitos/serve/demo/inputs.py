"""What a person gives the demo: a file and which picture of it, a question, boxes. Errors are whole sentences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitos.core.geometry import Box
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.data.images import ImageError, ImageFacts, load_image_facts
from vitos.data.picture import parse_selector, split_name

LONGEST_SIDE = 1024
"""Longest side of a shown picture in pixels; larger ones are scaled down, but the model sees the file as it is."""
ENDINGS = (".nii.gz", ".nii", ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Endings of names that files keep on the disk; only those of NIfTI and DICOM matter to how a file is read."""
MAX_BOXES = 32
MAX_QUESTION = 4000

Point = tuple[float, float]


def checked_question(text: str, images: int = 1) -> str:
    """The question without surrounding space; with its image placeholders only if it places several images itself.

    Raises:
        ValueError: if it is empty or too long.
    """
    text = (text or "").strip()
    if images == 1 or text.count(IMAGE_PLACEHOLDER) != images:
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
    if not text.replace(IMAGE_PLACEHOLDER, "").strip():
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


def windowed(name: str | Path, window: tuple[float, float] | None) -> Path:
    """A picture's name with a window (centre, width), unless it is None or the name has one already."""
    file, text = split_name(name)
    if window is None or parse_selector(text).window is not None:
        return Path(name)
    return Path(f"{file}#{'&'.join([*filter(None, [text]), f'window={window[0]:g},{window[1]:g}'])}")


def file_ending(path: Path) -> str:
    """The ending of a file's name if it is one of `ENDINGS`, which tell nothing about a patient; otherwise empty."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")


def fitting(picture: Image.Image) -> Image.Image:
    """The picture, its longer side at most `LONGEST_SIDE` pixels."""
    if max(picture.size) <= LONGEST_SIDE:
        return picture
    smaller = picture.copy()
    smaller.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return smaller


# --- boxes ----------------------------------------------------------------------------------------------------------


def parse_boxes(text: str, image: int = 1) -> tuple[Box, ...]:
    """Boxes as a person writes them: `x1, y1, x2, y2` in fractions of the image, one per line.

    A line may begin with the number of the picture, `2: x1, y1, x2, y2`; it becomes `Box.image`.

    Args:
        text: the lines.
        image: number of the picture of lines without one.

    Raises:
        ValueError: for a line that is no box, which the message names, or too many boxes.
    """
    boxes = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip(" \t,;[]"):
            continue
        own, _, edges = line.rpartition(":")
        try:
            place = int(own) if own.strip() else image
            x1, y1, x2, y2 = map(float, edges.strip(" \t,;[]").replace(",", " ").split())
        except ValueError:
            raise ValueError(f"Box {number} is not four numbers; write x1, y1, x2, y2, each from 0 to 1.") from None
        try:
            boxes.append(Box(x1, y1, x2, y2, place))
        except ValueError:
            raise ValueError(
                f"Box {number} does not lie in the image; write x1, y1, x2, y2 from 0 to 1 with x1 < x2 and y1 < y2."
            ) from None
    if len(boxes) > MAX_BOXES:
        raise ValueError(f"{len(boxes)} boxes; at most {MAX_BOXES} are used.")
    return tuple(boxes)


def readable_boxes(text: str, image: int = 1) -> tuple[Box, ...]:
    """The boxes in those lines that are complete, while a person is still writing; as `parse_boxes`."""
    boxes: list[Box] = []
    for line in (text or "").splitlines():
        with suppress(ValueError):
            boxes += parse_boxes(line, image)
    return tuple(boxes[:MAX_BOXES])


def format_boxes(boxes: Sequence[Box], several: bool = False) -> str:
    """The inverse of `parse_boxes`, with three decimals; a box that these would flatten keeps all its decimals.

    With `several` pictures on the page, each line begins with the picture's number.
    """
    lines = []
    for box in boxes:
        x1, y1, x2, y2 = (round(v, 3) for v in box.as_tuple())
        numbers = (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else box.as_tuple()
        lines.append(f"{box.image}: " * several + ", ".join(f"{v:g}" for v in numbers))
    return "\n".join(lines)


def box_between(first: Point, second: Point, image: int = 1) -> Box:
    """The box between two opposite corners, in fractions; what lies outside the image is cut off.

    Raises:
        ValueError: if the box has no area.
    """
    (x1, x2), (y1, y2) = (sorted(min(max(v, 0.0), 1.0) for v in pair) for pair in zip(first, second, strict=True))
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        raise ValueError("The two corners of a box must differ in both directions.")
    return Box(x1, y1, x2, y2, image)
