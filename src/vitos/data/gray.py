"""Values of a gray image → 8 bit, and the record of how: what Pillow, DICOM and NIfTI images have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ByteArray = NDArray[np.uint8]
WindowSource = Literal["selector", "file", "range"]
WindowFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


class VolumeError(ValueError):
    """A DICOM or NIfTI file cannot be used; says what is wrong without the path."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a picture came out of its file; stands beside results, so that another can make the same picture.

    Attributes:
        frame, axis, slice: as in `PictureSelector`; None where the file has no such thing.
        window: (centre, width) in the file's values; None for colour, 8-bit gray, and a look-up table of the file.
        window_source: from the selector, from the file's header, or the range of the picture's own values.
        inverted: the file says that low values are bright (MONOCHROME1).
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
        values: any shape, finite.
        window: (centre, width); width >= 1, for the other two functions > 0.
    """
    centre, width = window
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
        values: finite; all alike gives black.
        among: where the range is taken; values outside it are clipped.
    """
    inside = values if among is None or not among.any() else values[among]
    low, high = float(inside.min()), float(inside.max())
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((np.clip(values, low, high) - low) * scale).astype(np.uint8), ((low + high) / 2, high - low)


def render(
    values: FloatArray, window: tuple[float, float] | None, among: NDArray[np.bool_] | None = None
) -> tuple[ByteArray, tuple[float, float], WindowSource]:
    """Gray values, the window and where it comes from: the selector's `window`, else the range (see `stretch`)."""
    if window is not None:
        return apply_window(values, window), window, "selector"
    return (*stretch(values, among), "range")
