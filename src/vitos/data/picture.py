"""Which picture of a file is meant: `scan.dcm#frame=3`, `ct.nii.gz#axis=2&slice=40&window=40,400&crop=0,0,0.5,1`.

Everything behind the last `#` is read as `key=value` pairs joined by `&`, in records and on the command line:

| key | value | for |
| --- | --- | --- |
| `frame` | number of a frame, from 1 as in the DICOM standard | DICOM with several frames |
| `axis`, `slice` | 0, 1 or 2, and the index along it, from 0 as in nibabel | NIfTI |
| `window` | `centre,width` in the file's values (Hounsfield units for CT) | gray: DICOM, NIfTI, PNG, TIFF |
| `crop` | `x1,y1,x2,y2` in fractions of the upright stored picture: only this part is looked at | every image |
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from vitos.core.geometry import Box

_PAIRS = re.compile(r"(.+)#(\w+=[^#/\\]*)")
_WHOLE = re.compile(r"\d{1,9}")
KEYS = ("frame", "axis", "slice", "window", "crop")


@dataclass(frozen=True, slots=True)
class PictureSelector:
    """One picture of a file, how its values become gray, and which part of it is looked at.

    Attributes:
        frame: number of the frame, from 1; None: the file must have one.
        axis, slice: the axis across which a volume is cut (0..2), and the index along it, from 0.
        window: (centre, width) in the file's values, width >= 1; None: the file's own, or the range of the values.
        crop: the part that is used; None: all of it. Boxes remain fractions of the whole picture.
    """

    frame: int | None = None
    axis: int | None = None
    slice: int | None = None
    window: tuple[float, float] | None = None
    crop: Box | None = None

    def unused(self, *used: str) -> list[str]:
        """Keys that are set although a format knows only the `used` ones, and `crop` as all formats do."""
        return [key for key in KEYS if getattr(self, key) is not None and key not in (*used, "crop")]


def split_name(name: str | Path) -> tuple[Path, str]:
    """The file of an image's name, and its selector as written, or "". Nothing is validated."""
    match = _PAIRS.fullmatch(str(name))
    return (Path(match[1]), match[2]) if match else (Path(name), "")


def without_crop(name: str | Path) -> Path:
    """The name of the whole picture that a name selects a part of."""
    file, text = split_name(name)
    pairs = [pair for pair in text.split("&") if pair and not pair.startswith("crop=")]
    return file.with_name(f"{file.name}#{'&'.join(pairs)}") if pairs else file


def parse_selector(text: str, *, volume: bool = False) -> PictureSelector:
    """Read what follows the `#`.

    Args:
        text: the pairs.
        volume: whether a whole volume is named, with its axis and without a slice (`data/series.py`).

    Raises:
        ValueError: for an unknown or repeated key or a value out of its range; says what to write.
    """
    found: dict[str, str] = {}
    for pair in text.split("&") if text else ():
        key, _, value = pair.partition("=")
        if key not in KEYS:
            raise ValueError(f"{key!r} selects nothing; known are {', '.join(KEYS)}, such as #frame=3")
        if key in found:
            raise ValueError(f"{key} is given twice; write it once")
        found[key] = value
    if ("axis" in found) != ("slice" in found) and not (volume and "axis" in found):
        raise ValueError("axis and slice belong together; write #axis=2&slice=40")
    return PictureSelector(
        frame=_whole("frame", found, 1, None),
        axis=_whole("axis", found, 0, 2),
        slice=_whole("slice", found, 0, None),
        window=_window(found["window"]) if "window" in found else None,
        crop=_crop(found["crop"]) if "crop" in found else None,
    )


def _whole(key: str, found: dict[str, str], low: int, high: int | None) -> int | None:
    if key not in found:
        return None
    value = int(found[key]) if _WHOLE.fullmatch(found[key]) else -1
    if value < low or (high is not None and value > high):
        limits = f"from {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{key}={found[key]} is no whole number {limits}")
    return value


def _window(text: str) -> tuple[float, float]:
    """The DICOM standard's least width, 1, also keeps its linear formula from dividing by zero (C.11.2.1.2)."""
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        centre = width = math.nan
    if not (math.isfinite(centre) and math.isfinite(width) and width >= 1):
        raise ValueError(f"window={text} is no centre and width >= 1; write #window=40,400")
    return centre, width


def _crop(text: str) -> Box:
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
        return Box.snapped(x1, y1, x2, y2)
    except ValueError:
        raise ValueError(
            f"crop={text} is no part of the picture (fractions, x1 < x2 and y1 < y2); write #crop=0.1,0.2,0.6,0.9"
        ) from None
