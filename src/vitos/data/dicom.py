"""One frame of a DICOM file; needs the `dicom` extra (pydicom 3).

Only the tags in `TAGS` are read from the header: those that are needed to show the pixels. No value of them but size,
photometric interpretation and window leaves this module. Errors are worded here and not chained, and what pydicom
would say or log about a header is held back, because it quotes values.

What the pixels go through is in `data/dicom_pixels.py`, how numbers and tables are read in `data/dicom_header.py`.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitos.data.dicom_header import whole
from vitos.data.dicom_pixels import GRAY, PixelFormat, interpretation_of, pixel_format, render_frame
from vitos.data.gray import ByteArray, Rendering, VolumeError
from vitos.data.picture import PictureSelector

# Everything that is read from a header.
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
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "BurnedInAnnotation",
    "PixelData",
)
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422")
IN_JPEG_2000 = ("YBR_ICT", "YBR_RCT")  # its decoder makes RGB of them
# Scanners that compute their pixels; the others film, digitise or copy screens, where names get into the picture.
_COMPUTED = ("CT", "MR", "PT", "NM")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The pixels of a frame and how they were made.

    Attributes:
        pixels: uint8, (rows, columns) or (rows, columns, 3), in the order of the file.
        rendering: frame and window.
        interpretation: the photometric interpretation.
        warnings: what a user should look at, without a value of the header.
    """

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
        from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes
    except ImportError:
        raise VolumeError("reading DICOM needs pydicom 3; install it with pip install 'vitos[dicom]'") from None
    with silenced():
        try:
            # Deferred: that there are pixels is seen without reading them.
            header: Any = pydicom.dcmread(path, specific_tags=list(TAGS), defer_size=1024)
            syntax = _transfer_syntax(header)
            frames, interpretation, size = _check_header(header, syntax)
            packages = _check_decoder(syntax)
            form, warned = pixel_format(header, aligned=syntax in (*JPEG2000TransferSyntaxes, *JPEGLSTransferSyntaxes))
        except VolumeError:
            raise
        except Exception as error:  # noqa: BLE001  # pydicom raises anything on broken headers; told by its type only
            raise VolumeError(f"its header is broken or truncated ({type(error).__name__}); export it again") from None
        check_size(*size)
        number = _frame_number(selector, frames)
        try:
            cells = pixel_array(path, index=number - 1, **_decoding_options(header, syntax, form, frames))
            pixels, rendering, more = render_frame(cells, form, header, number - 1, selector)
        except VolumeError:
            raise
        except Exception as error:  # noqa: BLE001  # the same
            remedy = "export it again" + f", or try another decoder ({packages})" * bool(packages)
            raise VolumeError(f"its pixel data are broken or truncated ({type(error).__name__}); {remedy}") from None
    shown = replace(rendering, frame=number if frames > 1 else None)
    return Frame(
        pixels=pixels, rendering=shown, interpretation=interpretation, warnings=(*warned, *more, *_burned_in(header))
    )


@contextmanager
def silenced() -> Iterator[None]:
    """Hold back warnings and log lines of pydicom, which quote values; one file at a time, because both are global."""
    logger = logging.getLogger("pydicom")  # its own handler writes nothing
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            logger.propagate = propagate


def _transfer_syntax(header: Any) -> Any:
    """The transfer syntax; where a file forgot to name it, the uncompressed one that its header was read by."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    named = header.file_meta.get("TransferSyntaxUID")
    implicit, little = header.original_encoding
    return named or (ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian)


def _check_header(header: Any, syntax: Any) -> tuple[int, str, tuple[int, int]]:
    """Number of frames, photometric interpretation, and (width, height)."""
    from pydicom.uid import JPEG2000TransferSyntaxes

    if any(tag not in header for tag in ("Rows", "Columns", "PixelData")):
        raise VolumeError("a DICOM file without pixel data (a report, a plan, or cut off); give an image object")
    interpretation = interpretation_of(header)
    if interpretation not in (*GRAY, *COLOUR, *(IN_JPEG_2000 if syntax in JPEG2000TransferSyntaxes else ())):
        raise VolumeError("its photometric interpretation has no defined conversion; export it as gray or RGB")
    return whole(header, "NumberOfFrames", 1) or 1, interpretation, (int(header.Columns), int(header.Rows))


def _decoding_options(header: Any, syntax: Any, form: PixelFormat, frames: int) -> dict[str, Any]:
    """What pydicom would take from the header, with what a file may leave out filled in.

    Bits outside of the value stay: which they are is decided by HighBit, at which pydicom does not look.
    """
    interpretation = interpretation_of(header)
    samples = 1 if interpretation in (*GRAY, "PALETTE COLOR") else 3
    return {
        "transfer_syntax_uid": syntax,
        "photometric_interpretation": interpretation,
        "samples_per_pixel": whole(header, "SamplesPerPixel", samples),
        # Compressed colour comes pixel by pixel; headers often still say how it was before (PS3.5 section 8.2).
        "planar_configuration": 0 if syntax.is_encapsulated else whole(header, "PlanarConfiguration", 0),
        "number_of_frames": frames,
        "bits_allocated": form.allocated,
        "bits_stored": form.stored,
        "pixel_representation": int(form.signed),
        "correct_unused_bits": False,
    }


def _frame_number(selector: PictureSelector, frames: int) -> int:
    if selector.frame is None and frames != 1:
        raise VolumeError(f"{frames} frames; name the one that the question is about, such as #frame=1")
    number = selector.frame or 1
    if number > frames:
        raise VolumeError(f"frame={number} is not there; its frames are 1 to {frames}")
    return number


def _check_decoder(syntax: Any) -> str:
    """The packages that could decode a compressed transfer syntax but are not installed; "" if nothing is compressed.

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


def _burned_in(header: Any) -> Iterator[str]:
    """Warnings about text in the picture, without a value of the header."""
    said = str(header.get("BurnedInAnnotation") or "").upper()
    copied = str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    computed = str(header.get("Modality") or "") in _COMPUTED
    if said == "YES":
        yield "the file says that text is burned into its pixels; look for names before sharing or training on it"
    elif said != "NO" and (copied or not computed):
        yield "text may be burned into its pixels; look for names before sharing or training on it"
