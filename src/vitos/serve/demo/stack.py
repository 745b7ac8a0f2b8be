"""The pictures on the page: one image, several images, or the frames and slices of a file or a series.

Slices are asked about one at a time, the one that is shown, unless a rule such as `12 evenly` chooses several. Several
images, such as those of two dates, are always asked about together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitos.core.numbering import image_numbers
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.data.dicom import is_dicom
from vitos.data.dicom_series import frame_count, ordered_slices
from vitos.data.gray import VolumeError
from vitos.data.images import ImageError
from vitos.data.nifti import is_nifti, volume_size
from vitos.data.picture import parse_selector, split_name
from vitos.data.series import Series, open_series
from vitos.data.slices import chosen_slices

MAX_PICTURES = 32
"""Largest number of pictures that are asked about together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureStack:
    """Pictures in order.

    Attributes:
        paths: names of the pictures, with selectors.
        numbers: the number of each, as the prompt and boxes name it.
        word: "Image", "Frame" or "Slice".
        start: place of the picture that is shown first, from 0.
        axis: axis across which a volume is cut; None: it is no volume.
        source: names from which `open_series` takes several slices; empty for images.
        note: what a user should know of the order; may be empty.
    """

    paths: tuple[Path, ...]
    numbers: tuple[int, ...]
    word: str = "Image"
    start: int = 0
    axis: int | None = None
    source: tuple[Path, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def together(self) -> bool:
        """Whether questions are about all pictures."""
        return self.word == "Image"

    def choose(self, rule: str) -> Series | None:
        """The slices that a rule chooses, such as `12 evenly`; None for an empty rule: the one that is shown.

        Raises:
            ValueError: if there are no slices, the rule does not fit, or too many are chosen.
        """
        if not rule.strip():
            return None
        if not self.source:
            raise ValueError("These are no slices of one series; leave the field empty.")
        if (count := len(chosen_slices(rule, len(self)))) > MAX_PICTURES:
            raise ValueError(f"{count} slices; at most {MAX_PICTURES} are asked about together.")
        try:
            return open_series(self.source, rule)
        except ImageError as error:
            raise ValueError(error.reason) from error


def open_stack(names: Sequence[Path], question: str = "", axis: int | None = None) -> PictureStack:
    """The pictures of files that were opened together.

    Args:
        names: files, with a selector where an example names one frame or slice.
        question: the question that comes with them; it may number its images itself.
        axis: axis across which a volume is cut; None: that of the name, or the last one.

    Raises:
        ValueError: if there are too many images.
    """
    if len(names) > 1:
        placed = question.count(IMAGE_PLACEHOLDER) == len(names)
        return (None if placed else _series(names)) or _images(names, question)
    (file, text), (name,) = split_name(names[0]), names
    try:
        if is_nifti(file):
            return _volume(file, text, axis)
        if _is_dicom(file) and (frames := frame_count(file)) > 1:
            return _frames(file, text, frames)
    except VolumeError:
        pass  # opened as one picture, which says what is wrong with it
    return PictureStack(paths=(name,), numbers=(1,))


def _images(names: Sequence[Path], question: str, note: str = "") -> PictureStack:
    if len(names) > MAX_PICTURES:
        why = f" They are not one series: {note}." if note else ""
        raise ValueError(f"{len(names)} images; at most {MAX_PICTURES} are asked about together.{why}")
    numbers = image_numbers(question) if question.count(IMAGE_PLACEHOLDER) == len(names) else ()
    return PictureStack(paths=tuple(names), numbers=numbers or tuple(range(1, len(names) + 1)), note=note)


def _series(names: Sequence[Path]) -> PictureStack | None:
    """Slices of one DICOM series in order; None: other images, or names that choose frames."""
    if any(split_name(name)[1] or not _is_dicom(name) for name in names):
        return None
    try:
        paths = tuple(one.path for one in ordered_slices(names))
    except VolumeError as error:
        return _images(names, "", str(error))
    return PictureStack(
        paths=paths, numbers=_count(paths), word="Slice", start=len(paths) // 2, source=tuple(names)
    )  # fmt: skip


def _frames(file: Path, text: str, frames: int) -> PictureStack:
    """Frames of a file: slices in their order if it says where they lie, else as they are stored."""
    selector = parse_selector(text)
    word = "Slice"
    source: tuple[Path, ...] = (file,)
    try:
        order = [one.frame or 1 for one in ordered_slices([file])]
    except VolumeError:
        word, order, source = "Frame", list(range(1, frames + 1)), ()
    if selector.frame is not None and selector.frame not in order:
        return PictureStack(paths=(Path(f"{file}#{text}"),), numbers=(1,))
    start = order.index(selector.frame) if selector.frame is not None else len(order) // 2
    rest = [pair for pair in text.split("&") if pair and not pair.startswith("frame=")]
    paths = tuple(Path(f"{file}#{'&'.join([f'frame={number}', *rest])}") for number in order)
    return PictureStack(paths=paths, numbers=_count(paths), word=word, start=start, source=source)


def _volume(file: Path, text: str, axis: int | None) -> PictureStack:
    selector = parse_selector(text)
    shape, _ = volume_size(file)
    across = axis if axis is not None else selector.axis if selector.axis is not None else 2
    start = selector.slice if selector.slice is not None and across == selector.axis else shape[across] // 2
    rest = [pair for pair in text.split("&") if pair and not pair.startswith(("axis=", "slice="))]
    paths = tuple(Path(f"{file}#{'&'.join([f'axis={across}&slice={i}', *rest])}") for i in range(shape[across]))
    source = Path(f"{file}#{'&'.join([f'axis={across}', *rest])}")
    return PictureStack(
        paths=paths, numbers=_count(paths), word="Slice", start=min(start, len(paths) - 1), axis=across,
        source=(source,),
    )  # fmt: skip


def _count(paths: Sequence[Path]) -> tuple[int, ...]:
    return tuple(range(1, len(paths) + 1))


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return is_dicom(file.read(132))
