"""Values of a gray image → 8 bit, and the record of how: what Pillow, DICOM and NIfTI images have in common.

NaN means that there is no value (outside the brain, for example): such pixels are black and take no part in any range.
Infinite values are clipped to the ends of the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ByteArray = NDArray[np.uint8]
WindowSource = Literal["selector", "file", "range"]
WindowFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


NARROW = "its values need fewer bits than the header says; the brightest one decides what is white"


class VolumeError(ValueError):
    """A DICOM or NIfTI file cannot be used; says what is wrong without the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a picture came out of its file; kept with results, so that another person can make the same picture.

    Attributes:
        frame, axis, slice: as in `PictureSelector`; None where the file has no such thing.
        window: (centre, width) in the file's values; None for colour, 8-bit gray, and a look-up table of the file.
        window_source: from the selector, from the file's header, or the range of the picture's own values.
        inverted: whether the file says that low values are bright (MONOCHROME1, WhiteIsZero).
        crop: the part that was cut out, (x1, y1, x2, y2) in fractions of the upright stored picture, on pixel edges;
            None: nothing was.
    """

    frame: int | None = None
    axis: int | None = None
    slice: int | None = None
    window: tuple[float, float] | None = None
    window_source: WindowSource | None = None
    inverted: bool = False
    crop: tuple[float, float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as JSON values."""
        known: dict[str, Any] = {name: getattr(self, name) for name in ("frame", "axis", "slice")}
        known |= {"window": list(self.window) if self.window else None, "window_source": self.window_source}
        known |= {"crop": list(self.crop) if self.crop else None}
        return {k: v for k, v in known.items() if v is not None} | ({"inverted": True} if self.inverted else {})


def apply_window(values: FloatArray, window: tuple[float, float], function: WindowFunction = "LINEAR") -> ByteArray:
    """Gray values of a window, 0..255, rounded (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: any shape; NaN gives 0.
        window: (centre, width); width >= 1, for the other two functions > 0.

    >>> apply_window(np.array([-160.0, 40.0, 240.0, np.nan]), (40, 400)).tolist()
    [0, 128, 255, 0]
    """
    centre, width = window
    if np.isnan(values).any():
        values = np.where(np.isnan(values), -np.inf, values)
    share: NDArray[Any]
    if function == "SIGMOID":
        # Clipped where exp would overflow; it is 0 or 1 to the last bit long before.
        share = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        share = (values - centre) / width + 0.5
    elif width > 1:
        share = (values - (centre - 0.5)) / (width - 1) + 0.5
    else:
        share = values > centre - 0.5
    gray: ByteArray = np.rint(np.clip(share, 0.0, 1.0) * 255).astype(np.uint8)
    return gray


def stretch(values: FloatArray, among: NDArray[np.bool_] | None = None) -> tuple[ByteArray, tuple[float, float]]:
    """Gray from the least value (0) to the largest (255), and that range as (centre, width) of LINEAR_EXACT.

    Args:
        values: any shape, at least one finite; all alike gives black.
        among: where the range is taken; values outside it are clipped.
    """
    finite = np.isfinite(values)
    inside = finite if among is None or not (among & finite).any() else among & finite
    low, high = float(values[inside].min()), float(values[inside].max())
    # Halved, because a range of float64 may be wider than float64 holds.
    half = high / 2 - low / 2
    known = np.where(np.isnan(values), low, np.clip(values, low, high))
    share = (known / 2 - low / 2) / half if half > 0 else np.zeros(values.shape)
    return np.rint(share * 255).astype(np.uint8), (
        low / 2 + high / 2,
        min(high - low, float(np.finfo(np.float64).max)),
    )


def render(
    values: FloatArray, window: tuple[float, float] | None, among: NDArray[np.bool_] | None = None
) -> tuple[ByteArray, tuple[float, float], WindowSource]:
    """Gray values, the window and where it comes from: the selector's `window`, else the range (see `stretch`).

    Raises:
        VolumeError: if no value is finite.
    """
    if not np.isfinite(values).any():
        raise VolumeError("holds no finite value at all; give another slice, or save the file again")
    if window is not None:
        return apply_window(values, window), window, "selector"
    return (*stretch(values, among), "range")


def invert(gray: ByteArray, values: FloatArray) -> ByteArray:
    """Bright where it was dark; a pixel without a value stays black."""
    return np.where(np.isnan(values), 0, 255 - gray).astype(np.uint8)


def full_scale(peak: int, bits: int) -> int:
    """The value that is shown as white, where values are said to have `bits` bits and the largest one is `peak`.

    Values that need more bits than they are said to have decide by themselves. So do those that need two bits fewer
    or less, such as 12-bit values in 16 bits: shown by the header's word they would be nearly black.

    >>> full_scale(4095, 16), full_scale(30_000, 16), full_scale(4095, 8)
    (4095, 65535, 4095)
    """
    needed = peak.bit_length()
    return (1 << (bits if peak == 0 or bits - 1 <= needed <= bits else needed)) - 1


def scale_colour(values: NDArray[Any], bits: int) -> tuple[ByteArray, list[str]]:
    """Colour values of `bits` bits → 8 bit, and warnings; more than 8 bits may hold fewer than they say."""
    if bits == 8:
        return values.astype(np.uint8), []
    if bits < 8:
        return np.rint(values * (255 / ((1 << bits) - 1))).astype(np.uint8), []
    white = full_scale(int(values.max()), bits)
    if white >> bits - 2 == 0:
        return np.rint(values * (255 / white)).astype(np.uint8), [NARROW]
    return (values >> (bits - 8)).astype(np.uint8), []
