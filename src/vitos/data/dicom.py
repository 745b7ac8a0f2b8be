"""One frame of a DICOM file; needs the `dicom` extra (pydicom 3).

Of the header only the tags in `TAGS` are read: what is needed to show the pixels. No value of them leaves this module
but size, photometric interpretation and window; errors are worded here and not chained, and what pydicom would say or
log about a header (it quotes values) is held back.

Stored values → modality LUT or rescale → VOI LUT or window → 8 bit; MONOCHROME1 is inverted after that. Enhanced
multi-frame objects carry rescale and window in functional groups, which are looked into.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from vitos.data.gray import ByteArray, FloatArray, Rendering, VolumeError, WindowFunction, apply_window, render
from vitos.data.picture import PictureSelector

# Everything that is read of a header.
TAGS = (
    "SOPClassUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PlanarConfiguration",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "BurnedInAnnotation",
    "PixelData",
)
GRAY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")
# Scanners that compute their pixels; the others film, digitise or copy screens, where names get into the picture.
_COMPUTED = ("CT", "MR", "PT", "NM")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Frame:
    """Pixels as stored in place and order: uint8, (rows, columns) or (rows, columns, 3), and how they were made."""

    pixels: ByteArray
    rendering: Rendering
    interpretation: str
    warnings: tuple[str, ...]


def is_dicom(start: bytes) -> bool:
    """By the first 132 bytes of the file; its name says nothing."""
    return start[128:132] == b"DICM"


def read_frame(path: Path, selector: PictureSelector, check_size: Callable[[int, int], None]) -> Frame:
    """The selected frame; a file with one needs no selector.

    Args:
        check_size: called with width and height before a pixel is decoded; raises to refuse.

    Raises:
        VolumeError: no pydicom, no pixel data, a frame out of range, a transfer syntax without a decoder, a colour
            model that has no conversion, or a broken file.
    """
    try:
        import pydicom
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise VolumeError("reading DICOM needs pydicom 3; install it with pip install 'vitos[dicom]'") from None
    with _silenced():
        try:
            # Deferred: that there are pixels is seen without reading them.
            header: Any = pydicom.dcmread(path, specific_tags=list(TAGS), defer_size=1024)
            frames, interpretation, size = _check_header(header)
            packages = _check_decoder(header.file_meta.TransferSyntaxUID)
        except VolumeError:
            raise
        except Exception as error:  # noqa: BLE001  # pydicom raises anything on broken headers; told by its type only
            raise VolumeError(f"its header is broken or truncated ({type(error).__name__}); export it again") from None
        check_size(*size)
        number = _frame_number(selector, frames)
        try:
            stored = pixel_array(path, index=number - 1)
            pixels, rendering = _render(stored, header, number - 1, interpretation, selector)
        except VolumeError:
            raise
        except Exception as error:  # noqa: BLE001  # likewise
            remedy = "export it again" + f", or try another decoder ({packages})" * bool(packages)
            raise VolumeError(f"its pixel data are broken or truncated ({type(error).__name__}); {remedy}") from None
    shown = Rendering(number if frames > 1 else None, None, None, *rendering)
    return Frame(pixels, shown, interpretation, tuple(_burned_in(header)))


@contextmanager
def _silenced() -> Iterator[None]:
    """Neither warnings nor log lines of pydicom, which quote header values; one file at a time, as both are global."""
    logger = logging.getLogger("pydicom")  # has a handler of its own that writes nothing
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            logger.propagate = propagate


def _check_header(header: Any) -> tuple[int, str, tuple[int, int]]:
    """Number of frames, photometric interpretation, and (width, height)."""
    if any(tag not in header for tag in ("Rows", "Columns", "PixelData")):
        raise VolumeError("a DICOM file without pixel data (a report, a plan, or cut off); give an image object")
    interpretation = str(header.get("PhotometricInterpretation", ""))
    if interpretation not in (*GRAY, *COLOUR):
        raise VolumeError("its photometric interpretation has no defined conversion; export it as gray or RGB")
    return int(header.get("NumberOfFrames") or 1), interpretation, (int(header.Columns), int(header.Rows))


def _frame_number(selector: PictureSelector, frames: int) -> int:
    if selector.frame is None and frames != 1:
        raise VolumeError(f"{frames} frames; name the one that the question is about, such as #frame=1")
    number = selector.frame or 1
    if number > frames:
        raise VolumeError(f"frame={number} is not there; its frames are 1 to {frames}")
    return number


def _check_decoder(syntax: Any) -> str:
    """Packages that decode a compressed transfer syntax and are not installed; "" where nothing is compressed.

    Raises:
        VolumeError: if one is needed and none is installed.
    """
    from pydicom.pixels.decoders.base import get_decoder

    if syntax.is_deflated:  # the whole file would be inflated, whatever its size
        raise VolumeError("deflated as a whole; export it uncompressed")
    if not syntax.is_encapsulated:
        return ""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        problem = f"compressed as {syntax.name}, which pydicom cannot decode"
        raise VolumeError(f"{problem}; export it uncompressed") from None
    # As pydicom says it: "pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1".
    packages = ", or ".join(text.partition("requires ")[2] for text in decoder.missing_dependencies)
    if not decoder.is_available:
        raise VolumeError(f"compressed as {syntax.name}, and no decoder for it is installed; pip install {packages}")
    return packages


def _render(
    stored: NDArray[Any], header: Any, index: int, interpretation: str, selector: PictureSelector
) -> tuple[ByteArray, tuple[Any, ...]]:
    """8-bit pixels, and (window, its source, inverted)."""
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    if interpretation not in GRAY:
        if selector.window is not None:
            raise VolumeError("a colour image has no window; leave window out")
        palette = interpretation == "PALETTE COLOR"
        colour = apply_color_lut(stored, header) if palette else stored
        bits = 8 * colour.dtype.itemsize if palette else int(header.BitsStored)
        return (colour >> max(0, bits - 8)).astype(np.uint8), (None, None, False)
    rescale = _group(header, index, "PixelValueTransformationSequence", "RescaleSlope")
    values: FloatArray = np.asarray(apply_modality_lut(stored, rescale), dtype=np.float64)
    gray, window, source = _gray(values, stored, header, index, selector)
    inverted = interpretation == "MONOCHROME1"
    return (255 - gray if inverted else gray), (window, source, inverted)


def _gray(
    values: FloatArray, stored: NDArray[Any], header: Any, index: int, selector: PictureSelector
) -> tuple[ByteArray, tuple[float, float] | None, Any]:
    """The selector's window, else the file's look-up table or first window, else the range without padding."""
    from pydicom.pixels.processing import apply_voi

    if selector.window is not None:
        return render(values, selector.window)
    if header.get("VOILUTSequence"):
        table = apply_voi(values.astype(np.int64), header, index=0)
        _, _, bits = header.VOILUTSequence[0].LUTDescriptor
        return np.rint(table.astype(np.float64) * (255 / (2**bits - 1))).astype(np.uint8), None, "file"
    voi = _group(header, index, "FrameVOILUTSequence", "WindowCenter")
    centre, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    least = 1.0 if function == "LINEAR" else np.nextafter(0, 1)
    if centre is not None and width is not None and width >= least and function in get_args(WindowFunction):
        return apply_window(values, (centre, width), cast(WindowFunction, function)), (centre, width), "file"
    return render(values, None, _not_padding(stored, header))


def _group(header: Any, index: int, name: str, tag: str) -> Any:
    """The item that holds `tag` for a frame: its own functional group, the shared one, or the header itself."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*own[index : index + 1], *(header.get("SharedFunctionalGroupsSequence") or [])):
        items = group.get(name)
        if items and tag in items[0]:
            return items[0]
    return header


def _first(value: Any) -> float | None:
    """The first of one or several numbers; None if there is none."""
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


def _not_padding(stored: NDArray[Any], header: Any) -> NDArray[np.bool_] | None:
    """Where the pixels are no padding around the image (PS3.3 C.7.5.1.1.2)."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored < low) | (stored > high)


def _burned_in(header: Any) -> Iterator[str]:
    """Warnings without a value of the header."""
    said = str(header.get("BurnedInAnnotation") or "").upper()
    copied = str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    computed = str(header.get("Modality") or "") in _COMPUTED
    if said == "YES":
        yield "the file says that text is burned into its pixels; look for names before sharing or training on it"
    elif said != "NO" and (copied or not computed):
        yield "text may be burned into its pixels; look for names before sharing or training on it"
