"""TIFF files that Pillow opens in part only: thumbnails and masks behind the picture, WhiteIsZero with more bits."""

from __future__ import annotations

import io
import struct
from typing import Any

from PIL import Image

NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION = 254, 258, 262, 284
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
STARTS = (b"II*\0", b"MM\0*")
MAX_PAGES = 64
TURNED_OVER = "vitos: WhiteIsZero"
"""Key in the `info` of an image whose file was opened as BlackIsZero although it is not."""

_THUMBNAIL_OR_MASK = 0b101
_MAX_BYTES = 1 << 29


def full_pages(image: Image.Image, pages: int) -> list[int]:
    """The pages that are neither a reduced copy nor a mask of another one.

    Raises:
        ValueError: if a page cannot be opened, or one of Pillow's errors for broken files.
    """
    if pages > MAX_PAGES:
        return list(range(pages))
    kinds = []
    for page in range(pages):
        image.seek(page)
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        kinds.append(int(tags.get(NEW_SUBFILE_TYPE, 0)))
    full = [page for page, kind in enumerate(kinds) if not kind & _THUMBNAIL_OR_MASK] or list(range(pages))
    image.seek(full[0])
    return full


def open_turned_over(file: Any) -> Image.Image | None:
    """A WhiteIsZero file that Pillow does not know, opened as BlackIsZero and marked; None if that is not what it is.

    Pillow has no WhiteIsZero of 16 bits in big-endian files, for example. The values are the same under both.
    """
    file.seek(0)
    data = bytearray(file.read(_MAX_BYTES + 1))
    at = _photometric_at(data)
    if at is None or len(data) > _MAX_BYTES or data[at : at + 4] != b"\0\0\0\0":
        return None
    struct.pack_into("<H" if data[:2] == b"II" else ">H", data, at, 1)
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
    image.info[TURNED_OVER] = True
    return image


def _photometric_at(data: bytearray) -> int | None:
    """Where the first directory holds the value of PhotometricInterpretation, a short number in place."""
    if bytes(data[:4]) not in STARTS:
        return None
    order = "<" if data[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", data, at)
            if (tag, kind, number) == (PHOTOMETRIC, 3, 1):
                return at + 8
    except struct.error:
        return None
    return None
