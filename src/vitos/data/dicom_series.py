"""The slices of a DICOM series in the order of their places in the body; needs the `dicom` extra (pydicom 3).

File names and instance numbers say nothing reliable about order. What does is the position of each slice along the
normal of its plane (PS3.3 C.7.6.2): normal = row direction x column direction, place = position · normal, ascending.
In an axial series of the usual orientation this is from the feet to the head.

A series that is no stack of parallel slices at equal distances is refused, with the name of the file that does not
fit: slice numbers, and boxes in them, would mean something else than a reader thinks. Of the headers nothing but
geometry and window is used, and errors quote nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitos.data.dicom import is_dicom, silenced
from vitos.data.dicom_header import whole
from vitos.data.gray import VolumeError

T = TypeVar("T")
TAGS = (
    "SeriesInstanceUID",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "GantryDetectorTilt",
    "WindowCenter",
    "WindowWidth",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
SAME_DIRECTION = 1e-3
"""Largest difference of a component of two direction cosines that are taken as equal."""
EVEN = 0.1
"""Largest relative deviation of a distance between neighbours from the median one."""
LARGEST_ANGLE = 1.0
"""Largest angle in degrees between the normal of the slices and the line through their positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomSlice:
    """One slice as its header places it.

    Attributes:
        file: the file.
        frame: number of the frame, from 1; None for a file with one picture.
        series: identifier of its series; only compared.
        localizer: whether the file says that it is a localizer (scout).
        size: width and height in pixels.
        position: ImagePositionPatient in mm, shape (3,).
        axes: row and column direction, shape (2, 3).
        tilt: GantryDetectorTilt in degrees, or None.
        window: (centre, width) as text, or None where the header has no single one; only compared.
    """

    file: Path
    frame: int | None
    series: str
    localizer: bool
    size: tuple[int, int]
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    tilt: float | None
    window: str | None

    @property
    def name(self) -> str:
        """The file's name, with the frame if it has several."""
        return self.file.name if self.frame is None else f"{self.file.name}#frame={self.frame}"

    @property
    def path(self) -> Path:
        """The picture's name as records have it."""
        return self.file.with_name(self.name)


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder, without those in folders inside it; hidden files and DICOMDIR are left out.

    Raises:
        VolumeError: if there is none, or a file that is named as DICOM is none.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
            continue
        with path.open("rb") as file:
            if is_dicom(file.read(132)):
                found.append(path)
            elif path.suffix.lower() in (".dcm", ".dicom"):
                raise VolumeError(f"{path.name} is named as DICOM, but is none; export it again or remove it")
    if not found:
        raise VolumeError("the folder holds no DICOM file; name the folder of one series, or list the files")
    return found


def ordered_slices(files: Sequence[Path]) -> list[DicomSlice]:
    """All slices of one series by their place along the normal; parallel, of one size, no two at one place.

    Raises:
        VolumeError: for several series, a localizer, mixed orientations or sizes, two slices at one place, a tilted
            gantry, or a file without a position; it names the files.
    """
    found = [one for path in files for one in _read(path)]
    _one_series(found)
    if scout := next((one for one in found if one.localizer), None):
        raise VolumeError(
            f"{scout.name} is a localizer, not a slice of a stack; leave it out, or list the other files"
        )
    _same(found, "size", lambda one: one.size, lambda one: f"{one.size[0]} x {one.size[1]} pixels")
    first = found[0]
    if other := next((one for one in found if np.abs(one.axes - first.axes).max() > SAME_DIRECTION), None):
        raise VolumeError(
            f"{other.name} lies in another orientation than {first.name}; list the files of one orientation"
        )
    normal = np.cross(*first.axes)
    found.sort(key=lambda one: float(one.position @ normal))
    places = np.array([one.position @ normal for one in found])
    gaps = np.diff(places)
    typical = float(np.median(gaps)) if len(gaps) else 0.0
    for index in np.flatnonzero(gaps <= max(1e-3, EVEN * typical)).tolist():
        raise VolumeError(
            f"{found[index].name} and {found[index + 1].name} lie at one place ({places[index]:.2f} mm); the folder "
            "holds several phases, echoes or copies: list the files of one"
        )
    _not_sheared(found, normal)
    return found


def check_gaps(slices: Sequence[DicomSlice]) -> None:
    """Refuse neighbours that are not at equal distances.

    Args:
        slices: what lies between the first and the last slice that is looked at, in order.

    Raises:
        VolumeError: naming the slices next to the gap.
    """
    if len(slices) < 3:
        return
    normal = np.cross(*slices[0].axes)
    gaps = np.diff([one.position @ normal for one in slices])
    typical = float(np.median(gaps))
    index = int(np.abs(gaps - typical).argmax())
    if abs(gaps[index] - typical) <= EVEN * typical:
        return
    before, after = slices[index].name, slices[index + 1].name
    if gaps[index] > (2 - EVEN) * typical:
        missing = round(float(gaps[index]) / typical) - 1
        what = "a slice is" if missing == 1 else f"{missing} slices are"
        problem = f"{what} missing between {before} and {after} ({gaps[index]:.2f} mm, elsewhere {typical:.2f} mm)"
        raise VolumeError(f"{problem}; add the files, or choose slices on one side of the gap")
    raise VolumeError(
        f"slices are not at equal distances: {gaps[index]:.2f} mm between {before} and {after}, elsewhere "
        f"{typical:.2f} mm; choose slices with one distance, or resample the series"
    )


def spacing(slices: Sequence[DicomSlice]) -> float | None:
    """Median distance of neighbours in mm; None for one slice."""
    if len(slices) < 2:
        return None
    return float(np.median(np.diff([one.position @ np.cross(*slices[0].axes) for one in slices])))


def frame_count(path: Path) -> int:
    """Number of frames of a DICOM file by its header; no pixel is read.

    Raises:
        VolumeError: no pydicom, or a broken header.
    """
    return _from_header(path, ["NumberOfFrames"], lambda header: whole(header, "NumberOfFrames", 1) or 1)


def _read(path: Path) -> Iterator[DicomSlice]:
    yield from _from_header(path, TAGS, lambda header: list(_slices(path, header)))


def _from_header(path: Path, tags: Sequence[str], read: Callable[[Any], T]) -> T:
    try:
        import pydicom
    except ImportError:
        raise VolumeError("reading DICOM needs pydicom 3; install it with pip install 'vitos[dicom]'") from None
    with silenced():
        try:
            return read(pydicom.dcmread(path, specific_tags=list(tags), stop_before_pixels=True))
        except VolumeError:
            raise
        except Exception as error:  # noqa: BLE001  # pydicom raises anything on broken headers; told by its type only
            kind = type(error).__name__
            raise VolumeError(f"{path.name}: its header is broken or truncated ({kind}); export it again") from None


def _slices(path: Path, header: Any) -> Iterator[DicomSlice]:
    frames = int(header.get("NumberOfFrames") or 1)
    if "Rows" not in header or "Columns" not in header:
        raise VolumeError(f"{path.name} holds no image (a report or a plan); leave it out, or list the files")
    if frames > 1 and "PerFrameFunctionalGroupsSequence" not in header:
        raise VolumeError(
            f"{path.name} has {frames} frames without positions, a film and not a volume; name a frame: #frame=1"
        )
    shared = next(iter(header.get("SharedFunctionalGroupsSequence") or ()), None)
    own = list(header.get("PerFrameFunctionalGroupsSequence") or ()) if frames > 1 else [None]
    if len(own) != frames:
        raise VolumeError(f"{path.name} has {frames} frames, but places {len(own)}; export it again")
    for number, group in enumerate(own, start=1):
        position = _placed("ImagePositionPatient", "PlanePositionSequence", 3, group, shared, header)
        axes = _placed("ImageOrientationPatient", "PlaneOrientationSequence", 6, group, shared, header)
        if position is None or axes is None or not np.any(np.cross(axes[:3], axes[3:])):
            raise VolumeError(f"{path.name} does not say where it lies (position and orientation); use single images")
        tilt = header.get("GantryDetectorTilt")
        window = (header.get("WindowCenter"), header.get("WindowWidth"))
        yield DicomSlice(
            file=path,
            frame=number if frames > 1 else None,
            series=str(header.get("SeriesInstanceUID")),
            localizer="LOCALIZER" in [str(word).strip().upper() for word in header.get("ImageType") or ()],
            size=(int(header.Columns), int(header.Rows)),
            position=position,
            axes=axes.reshape(2, 3),
            tilt=None if tilt in (None, "") else float(tilt),
            window=None if any(part in (None, "") for part in window) else str(window),
        )


def _placed(name: str, sequence: str, count: int, *items: Any) -> NDArray[np.float64] | None:
    """The numbers of a tag: of the frame, of all frames, or of the file; None if they are not `count` finite ones."""
    for item in items:
        holders = [] if item is None else [*(item.get(sequence) or ()), item]
        for holder in holders:
            if (values := holder.get(name)) is not None:
                numbers = np.array([float(value) for value in values])
                return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None
    return None


def _one_series(slices: Sequence[DicomSlice]) -> None:
    groups: dict[str, list[str]] = {}
    for one in slices:
        groups.setdefault(one.series, []).append(one.file.name)
    if len(groups) > 1:
        listed = "; ".join(f"{len(set(names))} with {names[0]}" for names in groups.values())
        raise VolumeError(f"files of {len(groups)} series ({listed}); list the files of one series")


def _same(
    slices: Sequence[DicomSlice], what: str, value: Callable[[DicomSlice], Any], told: Callable[[DicomSlice], str]
) -> None:
    first = slices[0]
    if other := next((one for one in slices if value(one) != value(first)), None):
        raise VolumeError(
            f"{other.name} has another {what} than {first.name} ({told(other)}, {told(first)}); list the files of one"
        )


def _not_sheared(slices: Sequence[DicomSlice], normal: NDArray[np.float64]) -> None:
    """Slices of a tilted gantry, or shifted sideways, do not lie one behind the other."""
    way = slices[-1].position - slices[0].position
    length = float(np.linalg.norm(way))
    if length == 0:
        return
    angle = float(np.degrees(np.arccos(min(1.0, abs(float(way @ normal)) / length / float(np.linalg.norm(normal))))))
    if angle > LARGEST_ANGLE:
        tilt = slices[0].tilt
        cause = f"the gantry was tilted by {tilt:g} degrees" if tilt else "the slices are shifted sideways"
        raise VolumeError(
            f"{cause}: the stack leans by {angle:.1f} degrees from the normal of its slices, so a place in one is "
            "another place in the next; resample it to an upright volume, or use single images"
        )
