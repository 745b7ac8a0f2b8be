"""A DICOM series or a NIfTI volume as one question's images: an ordered list of slices with their numbers.

    folder of one series, or its files ─┐
    one enhanced multi-frame file       ├─► slices in order ─► those of a rule ─► names that records have
    volume.nii.gz#axis=2                ┘

From here on a slice is an image like any other: `ct/IM003.dcm#window=40,400`, `volume.nii.gz#axis=2&slice=16`. Slices
are counted from 1 along the stack, whatever the rule leaves out, and the prompt calls them by these numbers.

All slices of a series have one window: the one that is given behind the name (`ct#window=40,400`), or the one that all
files name, or the range over the chosen slices. A window for each slice would make a dark organ bright where nothing
brighter is next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitos.core.numbering import IMAGE_PLACEHOLDER
from vitos.data.dicom_series import check_gaps, dicom_files, ordered_slices, spacing
from vitos.data.gray import VolumeError
from vitos.data.images import ImageError, load_image_facts
from vitos.data.nifti import is_nifti, volume_size
from vitos.data.picture import PictureSelector, parse_selector, split_name
from vitos.data.slices import chosen_slices

WORD = "Slice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The chosen slices of a series.

    Attributes:
        paths: the slices as records name them, in order.
        numbers: their numbers in the whole series, from 1.
        total: number of slices of the series.
        spacing: distance of neighbouring slices of the series in mm; None if it is not known.
    """

    paths: tuple[Path, ...]
    numbers: tuple[int, ...]
    total: int
    spacing: float | None = None

    @property
    def lead(self) -> str:
        """What stands in front of a question: one line per slice, such as `Slice 17: <image>`."""
        return "".join(f"{WORD} {number}: {IMAGE_PLACEHOLDER}\n" for number in self.numbers)

    def place(self, number: int) -> int:
        """The place of a slice among the chosen ones, from 1, as `Box.image` counts.

        Raises:
            ValueError: if the slice is not there or was not chosen.
        """
        if number not in self.numbers:
            why = f"the series has {self.total}" if number > self.total else "its rule leaves it out"
            raise ValueError(f"slice {number} is not among the images: {why}")
        return self.numbers.index(number) + 1


def open_series(names: Sequence[str | Path], rule: str) -> Series:
    """Order a series and choose its slices.

    Args:
        names: one folder, one or more DICOM files, or one NIfTI file with its axis; `window` and `crop` behind a
            single name hold for all slices.
        rule: which slices, see `chosen_slices`.

    Raises:
        ImageError: if it is no volume, or the rule does not fit; the message names the file and what to do.
    """
    first, text = split_name(names[0])
    where = first if len(names) == 1 else first.parent
    if missing := next((file for file in (split_name(name)[0] for name in names) if not file.exists()), None):
        raise ImageError(missing, "there is no such file or folder; check the path")
    try:
        selector = parse_selector(text, volume=True)
        if len(names) == 1 and is_nifti(first):
            return _nifti(first, text, selector, rule)
        return _dicom([split_name(name)[0] for name in names], text, selector, rule)
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(where, str(error)) from None
    except OSError as error:
        raise ImageError(where, f"cannot be read ({error.strerror}); check the path") from None


def _nifti(path: Path, text: str, selector: PictureSelector, rule: str) -> Series:
    if unused := selector.unused("window", "axis"):
        raise VolumeError(f"with slices, {' and '.join(unused)} cannot be chosen as well; leave it out")
    if selector.axis is None:
        raise VolumeError(f"along which axis are the slices? write {path.name}#axis=2 (0, 1 or 2, as stored)")
    shape, voxel = volume_size(path)
    total = shape[selector.axis]
    numbers = chosen_slices(rule, total)
    paths = [path.with_name(f"{path.name}#{text}&slice={number - 1}") for number in numbers]
    return Series(paths=_windowed(paths, selector), numbers=numbers, total=total, spacing=voxel[selector.axis])


def _dicom(files: Sequence[Path], text: str, selector: PictureSelector, rule: str) -> Series:
    if unused := selector.unused("window"):
        raise VolumeError(f"with slices, {' and '.join(unused)} cannot be chosen as well; leave it out")
    if folders := [file for file in files if file.is_dir()]:
        if len(files) > 1:
            raise VolumeError(f"{folders[0].name} is a folder in a list of files; name one folder, or files only")
        files = dicom_files(folders[0])
    slices = ordered_slices(files)
    numbers = chosen_slices(rule, len(slices))
    check_gaps(slices[numbers[0] - 1 : numbers[-1]])
    chosen = [slices[number - 1] for number in numbers]
    paths = [one.path for one in chosen]
    if text:
        paths = [path.with_name(path.name + ("&" if "#" in path.name else "#") + text) for path in paths]
    if len({one.window for one in chosen}) > 1 or chosen[0].window is None:
        paths = list(_windowed(paths, selector))
    return Series(paths=tuple(paths), numbers=numbers, total=len(slices), spacing=spacing(slices))


def _windowed(paths: Sequence[Path], selector: PictureSelector) -> tuple[Path, ...]:
    """The same slices with one window for all of them, from the range of their values; as they are if one is given.

    Colour and 8-bit gray have no window and are left as they are.
    """
    if selector.window is not None:
        return tuple(paths)
    windows = [facts.rendering.window for facts in (load_image_facts(path)[1] for path in paths)]
    known = [window for window in windows if window is not None]
    if len(known) < len(windows):
        return tuple(paths)
    low = min(centre - width / 2 for centre, width in known)
    high = max(centre + width / 2 for centre, width in known)
    # The standard's linear function reaches black and white half a unit inside (PS3.3 C.11.2.1.2).
    window = f"window={(low + high) / 2 + 0.5:g},{high - low + 1:g}"
    return tuple(path.with_name(path.name + ("&" if "#" in path.name else "#") + window) for path in paths)
