"""The images that `vitos ask` is given: one, several, or the slices of a series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitos.core.geometry import Box
from vitos.data.images import DataError, ImageFacts, load_image, load_image_facts
from vitos.data.picture import split_name, without_crop
from vitos.data.series import Series, open_series
from vitos.data.slices import FORMS


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedImages:
    """Opened images of one question.

    Attributes:
        paths: their names, with selectors.
        pictures: what the model sees of them, RGB.
        facts: how they were opened.
        series: the series whose slices they are; None for single images.
    """

    paths: tuple[Path, ...]
    pictures: tuple[Image.Image, ...]
    facts: tuple[ImageFacts, ...]
    series: Series | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each image in the prompt."""
        return self.series.numbers if self.series else tuple(range(1, len(self.paths) + 1))

    @property
    def lead(self) -> str:
        """Text in front of the question; see `Scan`."""
        return self.series.lead if self.series else ""

    def summary(self) -> str:
        """What was opened, in a line."""
        if self.series is None:
            return "\n".join(facts.summary() for facts in self.facts)
        shown, apart = self.series, self.series.spacing
        distance = f", {apart:g} mm apart" if apart else ""
        numbers = ", ".join(map(str, shown.numbers))
        return f"{len(shown.numbers)} of {shown.total} slices{distance} ({numbers}); {self.facts[0].summary()}"

    def whole(self) -> list[Image.Image]:
        """The whole images, for an overlay."""
        return [load_image(without_crop(path)) for path in self.paths]

    def named(self, box: Box) -> str:
        """A box as the command line writes it, with the number of its image where there are several."""
        edges = str([round(v, 3) for v in box.as_tuple()])
        word = "slice" if self.series else "image"
        return edges if len(self.paths) == 1 else f"{word} {self.numbers[box.image - 1]} {edges}"

    def placed(self, box: Box) -> Box:
        """A box whose image was given by its number in the prompt.

        Raises:
            DataError: if there is no such image.
        """
        if len(self.paths) == 1:
            return box
        if box.image not in self.numbers:
            raise DataError(f"--box names image {box.image}, but there are {', '.join(map(str, self.numbers))}")
        return Box(*box.as_tuple(), image=self.numbers.index(box.image) + 1)


def open_asked(names: Sequence[Path], slices: str | None) -> AskedImages:
    """Open the images of a question.

    Args:
        names: images, or with `slices` one folder or volume, or the files of one series.
        slices: which slices of a series; None for single images.

    Raises:
        DataError: if something cannot be opened, or is a folder and `slices` is not given.
    """
    series = None
    if slices is not None:
        series = open_series(names, slices)
    elif folder := next((name for name in names if split_name(name)[0].is_dir()), None):
        raise DataError(f"{folder} is a folder; say which of its slices: --slices '12 evenly' ({FORMS})")
    paths = series.paths if series else tuple(names)
    opened = [load_image_facts(path) for path in paths]
    pictures, facts = zip(*opened, strict=True)
    return AskedImages(paths=paths, pictures=pictures, facts=facts, series=series)


def read_box(text: str) -> Box:
    """`x1,y1,x2,y2`, or `2:x1,y1,x2,y2` in the image or slice of that number.

    >>> read_box("17:0,0,0.5,0.5").image
    17

    Raises:
        ValueError: for anything else.
    """
    number, _, edges = text.rpartition(":")
    x1, y1, x2, y2 = map(float, edges.split(","))
    return Box(x1, y1, x2, y2, int(number) if number else 1)
