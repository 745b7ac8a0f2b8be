"""Stored pixels of a DICOM frame → 8 bit, by the standard's grayscale pipeline.

Pixel cells → stored values → modality LUT or rescale → VOI LUT or window → 8 bit; MONOCHROME1 is inverted after that.
Enhanced multi-frame objects carry rescale and window in functional groups, which are looked into. What the header says
and the pixels or tables contradict is a warning; no value of a header is quoted in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from vitos.data.dicom_header import LookupTable, number, numbers, read_palette, read_table, whole, word
from vitos.data.gray import (
    ByteArray,
    FloatArray,
    Rendering,
    VolumeError,
    WindowFunction,
    apply_window,
    full_scale,
    invert,
    render,
    scale_colour,
)
from vitos.data.picture import PictureSelector

GRAY = ("MONOCHROME1", "MONOCHROME2")

NARROW_TABLE = "a look-up table holds smaller entries than the header says; the largest one decides what is white"
SHORT_TABLE = "a look-up table holds fewer entries than the header says; its last entry stands for the rest"
NO_SLOPE = "its RescaleSlope is 0 and was left out; look at the gray levels"
NO_WINDOW = "its window cannot be used (centre, width or function); the range of its values was taken"
HIGH_BIT = "its HighBit contradicts BitsStored and was left out; look at the gray levels"


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelFormat:
    """Where the value of a pixel lies in its cell (PS3.5 section 8.1.1).

    Attributes:
        allocated: number of bits of a cell.
        stored: number of bits of a value.
        high: the value's highest bit, from 0.
        signed: whether values are in two's complement.
        aligned: whether the decoder has moved values to the lowest bits already, as JPEG 2000 and JPEG-LS do.
    """

    allocated: int
    stored: int
    high: int
    signed: bool
    aligned: bool = False


def pixel_format(header: Any, *, aligned: bool) -> tuple[PixelFormat, list[str]]:
    """The format that a header describes, and warnings."""
    allocated = whole(header, "BitsAllocated", 16)
    stored = whole(header, "BitsStored", allocated)
    high = whole(header, "HighBit", stored - 1)
    possible = stored - 1 <= high < allocated
    signed = whole(header, "PixelRepresentation", 0) == 1
    high = high if possible else stored - 1
    found = PixelFormat(allocated=allocated, stored=stored, high=high, signed=signed, aligned=aligned)
    return found, [] if possible else [HIGH_BIT]


def stored_values(cells: NDArray[Any], form: PixelFormat) -> NDArray[Any]:
    """The values in pixel cells; what lies in the other bits (overlays, for example) is cut off."""
    shift = form.high + 1 - form.stored
    if form.allocated == 1 or (shift == 0 and (form.aligned or form.stored == form.allocated)):
        return cells
    plain = cells.view(f"u{cells.itemsize}")
    if form.aligned and plain.max() < 1 << form.stored:
        return cells
    # Signed or not, the type's own shift does it: to the top of the cell, then down to its bottom.
    return cells << (form.allocated - 1 - form.high) >> (form.allocated - form.stored)


def render_frame(
    cells: NDArray[Any], form: PixelFormat, header: Any, index: int, selector: PictureSelector
) -> tuple[ByteArray, Rendering, list[str]]:
    """8-bit pixels of frame `index`, how they were made, and warnings.

    Args:
        cells: shape (rows, columns) or (rows, columns, 3), as decoded.

    Raises:
        VolumeError: for a window on a colour image, or a number or palette in the header that cannot be read.
    """
    interpretation = interpretation_of(header)
    channels = 1 if interpretation in (*GRAY, "PALETTE COLOR") else 3
    if cells.shape[2:] != ((3,) if channels == 3 else ()):
        raise VolumeError("its photometric interpretation contradicts SamplesPerPixel; export it as gray or RGB")
    stored = stored_values(cells, form)
    if interpretation not in GRAY:
        if selector.window is not None:
            raise VolumeError("a colour image has no window; leave window out")
        palette = interpretation == "PALETTE COLOR"
        pixels, warned = _palette(stored, header) if palette else scale_colour(stored, form.stored)
        return pixels, Rendering(), warned
    values, warned = _modality(stored, header, index)
    gray, shown, more = _gray(values, header, index, selector, _not_padding(cells, stored, header))
    if interpretation == "MONOCHROME1":
        gray, shown = invert(gray, values), replace(shown, inverted=True)
    return gray, shown, [*warned, *more]


def interpretation_of(header: Any) -> str:
    """The photometric interpretation as the standard spells it."""
    return str(header.get("PhotometricInterpretation") or "").strip(" \0").upper()


def is_little_endian(header: Any) -> bool:
    return bool(header.original_encoding[1])


# --- gray -----------------------------------------------------------------------------------------------------------


def _modality(stored: NDArray[Any], header: Any, index: int) -> tuple[FloatArray, list[str]]:
    """Values after the modality look-up table, or else after rescale; an empty slope is 1, an empty intercept 0."""
    table = _first_table(header, "ModalityLUTSequence", is_little_endian(header))
    if table is not None:
        return table.look_up(stored).astype(np.float64), [] if table.complete else [SHORT_TABLE]
    for item in _places(header, index, "PixelValueTransformationSequence"):
        slope, intercept = number(item, "RescaleSlope"), number(item, "RescaleIntercept")
        if slope == 0:
            return stored.astype(np.float64), [NO_SLOPE]
        if slope is not None or intercept is not None:
            return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0), []
    return stored.astype(np.float64), []


def _gray(
    values: FloatArray, header: Any, index: int, selector: PictureSelector, among: NDArray[np.bool_] | None
) -> tuple[ByteArray, Rendering, list[str]]:
    """The selector's window, else the file's look-up table or first window, else the range of what is `among`."""
    unusable = False
    for item in _places(header, index, "FrameVOILUTSequence") if selector.window is None else ():
        table = _first_table(item, "VOILUTSequence", is_little_endian(header))
        if table is not None:
            looked_up = table.look_up(np.rint(values)) * (255 / table.white)
            warned = [SHORT_TABLE] * (not table.complete) + [NARROW_TABLE] * (table.white >> table.bits - 1 == 0)
            return np.rint(looked_up).astype(np.uint8), Rendering(window_source="file"), warned
        window, function, left_out = _file_window(item)
        if window is not None:
            shown = Rendering(window=window, window_source="file")
            return apply_window(values, window, function), shown, []
        unusable |= left_out
    gray, used, source = render(values, selector.window, among)
    return gray, Rendering(window=used, window_source=source), [NO_WINDOW] * unusable


def _file_window(item: Any) -> tuple[tuple[float, float] | None, WindowFunction, bool]:
    """The first window of a header that can be used, its function, and whether there is only one that cannot."""
    try:
        pairs = list(zip(numbers(item, "WindowCenter"), numbers(item, "WindowWidth"), strict=False))
    except VolumeError:
        return None, "LINEAR", True
    given = [(centre, width) for centre, width in pairs if centre is not None and width is not None]
    function = str(item.get("VOILUTFunction") or "LINEAR").strip(" \0").upper()
    if function not in get_args(WindowFunction):
        return None, "LINEAR", bool(given)
    usable = [pair for pair in given if pair[1] >= 1 or (function != "LINEAR" and pair[1] > 0)]
    return (usable[0] if usable else None), cast(WindowFunction, function), bool(given) and not usable


def _not_padding(cells: NDArray[Any], stored: NDArray[Any], header: Any) -> NDArray[np.bool_] | None:
    """Where the pixels are no padding around the image (PS3.3 C.7.5.1.1.2); None where the header names none.

    Padding may be written with the other sign than the pixels, and in bits that no value uses.
    """
    little = is_little_endian(header)
    ends = [word(header, name, little=little) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    kind = np.dtype(f"{cells.dtype.kind}{min(cells.itemsize, 2)}")
    known = [int(np.array(end, np.uint16).astype(kind)) for end in ends if end is not None]
    low, high = min(known), max(known)
    return ~(((stored >= low) & (stored <= high)) | ((cells >= low) & (cells <= high)))


def _places(header: Any, index: int, group: str) -> Iterator[Any]:
    """Where a value of a frame may be: its own functional group, the shared one, then the header itself."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    for item in (*own[index : index + 1], *(header.get("SharedFunctionalGroupsSequence") or [])):
        yield from (item.get(group) or [])[:1]
    yield header


def _first_table(item: Any, sequence: str, little: bool) -> LookupTable | None:
    """The first usable table of a sequence; None if there is none, as where it is empty."""
    tables = (read_table(part, "LUTDescriptor", "LUTData", little=little) for part in item.get(sequence) or [])
    return next((table for table in tables if table is not None), None)


# --- colour ---------------------------------------------------------------------------------------------------------


def _palette(stored: NDArray[Any], header: Any) -> tuple[ByteArray, list[str]]:
    tables = read_palette(header, little=is_little_endian(header))
    colour = np.stack([table.look_up(stored) for table in tables], axis=-1)
    peak, bits = max(int(table.entries.max()) for table in tables), max(table.bits for table in tables)
    # A palette of 8 bits may be dark on purpose; one of 16 bits whose entries fit into 8 was written from such a one.
    white = 255 if peak <= 255 else full_scale(peak, max(bits, 9))
    warned = [SHORT_TABLE] * (not all(table.complete for table in tables)) + [NARROW_TABLE] * (white < 255 << bits - 8)
    if white == 65535:
        return (colour >> 8).astype(np.uint8), warned
    return np.rint(colour * (255 / white)).astype(np.uint8), warned
