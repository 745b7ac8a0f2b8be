"""TIFF files that Pillow opens in part only: thumbnails and masks behind the picture, gray that it does not know."""

from __future__ import annotations

import io
import struct
from typing import Any

from PIL import Image

NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION = 254, 258, 262, 284
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGES = 64
OTHER_TAGS = "vitos: (type of the values, whether low values are bright)"
"""Key in the `info` of an image that Pillow opened with other tags than its file has."""

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


def open_with_other_tags(file: Any) -> Image.Image | None:
    """A gray TIFF that Pillow does not know, opened under tags that it knows; None if there are none.

    Pillow has no WhiteIsZero of 16 bits in big-endian files, no big-endian unsigned 32 bits and no 16-bit floats. The
    bits are the same under BlackIsZero and another type of number. What they are in the file is kept in `info`.
    """
    file.seek(0)
    data = file.read(_MAX_BYTES + 1)
    if data[:4] not in STARTS[:2] or len(data) > _MAX_BYTES:
        return None
    order = "<" if data[:2] == b"II" else ">"
    try:
        entries, rest = _first_directory(data, order)
        numbers = {tag: _number(entry, order) for tag, entry in entries.items()}
        sample_format = numbers.get(SAMPLE_FORMAT, 1)
        kind, known = _KINDS.get((numbers.get(BITS_PER_SAMPLE), sample_format), (None, sample_format))
        for tag, number in ((PHOTOMETRIC, 1), (SAMPLE_FORMAT, known)):
            entries[tag] = struct.pack(f"{order}HHIHxx", tag, 3, 1, number)
        directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + rest
        head = data[:4] + struct.pack(f"{order}I", len(data))  # the changed directory is appended
        image = Image.open(io.BytesIO(head + data[8:] + directory), formats=("TIFF",))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError):
        return None
    if numbers.get(PHOTOMETRIC) not in (0, 1):
        return None
    image.info[OTHER_TAGS] = (kind, numbers[PHOTOMETRIC] == 0)
    return image


_KINDS: dict[tuple[int | None, int | None], tuple[str | None, int | None]] = {
    (32, 1): ("uint32", 2),
    (16, 3): ("float16", 1),
    (8, 2): ("int8", 2),
}
"""(bits, sample format) → the type of the values, and the sample format under which Pillow reads their bits."""


def _first_directory(data: bytes, order: str) -> tuple[dict[int, bytes], bytes]:
    """The entries of the first directory by tag, and the four bytes after them."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    end = start + 2 + 12 * count
    cut = [data[at : at + 12] for at in range(start + 2, end, 12)]
    return {struct.unpack(f"{order}H", entry[:2])[0]: entry for entry in cut}, data[end : end + 4]


def _number(entry: bytes, order: str) -> int | None:
    """The value of an entry with one short or long number; None for any other."""
    _, kind, count = struct.unpack(f"{order}HHI", entry[:8])
    if count != 1 or kind not in (3, 4):
        return None
    return int(struct.unpack(order + {3: "Hxx", 4: "I"}[kind], entry[8:])[0])
