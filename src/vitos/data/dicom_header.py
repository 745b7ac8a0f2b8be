"""Numbers and look-up tables of a DICOM header, read from the bytes as tolerantly as viewers read them.

pydicom's own conversion refuses an empty or misspelt number and trusts every descriptor of a table. Files from the
field have decimal commas, 8-bit entries packed two to a word, and tables with other entries than they say. No value
of a header is quoted in a message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitos.data.gray import VolumeError, full_scale

WordArray = NDArray[np.uint16]

_BINARY = ("FD", "FL", "SL", "SS", "SV", "UL", "US", "UV")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_MOST_ENTRIES = 1 << 16


# --- numbers --------------------------------------------------------------------------------------------------------


def numbers(item: Any, name: str) -> list[float | None]:
    """The values of a tag with decimal numbers; None for one that is empty, [] where the tag is not there.

    A single comma is read as the decimal mark, which some writers take from the computer's language.

    Raises:
        VolumeError: for a value that is neither empty nor a finite number.
    """
    element = item.get_item(name)
    if element is None or element.value is None or element.value == b"":
        return []
    if isinstance(element.value, bytes) and element.VR not in _BINARY:
        parts: Sequence[Any] = element.value.decode("latin-1").split("\\")
    else:
        value = item[name].value
        parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [_number(str("" if part is None else part).strip(" \0\t\r\n"), name) for part in parts]


def number(item: Any, name: str) -> float | None:
    """The first value of a tag with decimal numbers; None where it has none."""
    return next(iter(numbers(item, name)), None)


def _number(text: str, name: str) -> float | None:
    if not text:
        return None
    plain = text.replace(",", ".") if text.count(",") == 1 and "." not in text else text
    value = float(plain) if _NUMBER.fullmatch(plain) else np.inf
    if not np.isfinite(value):
        raise VolumeError(f"its {name} is no number; correct the header or export the file again")
    return value


def whole(header: Any, name: str, default: int) -> int:
    """The first value of a tag with whole numbers; `default` where it has none or is empty."""
    value = header.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return default if value is None or value == "" else int(value)


def word(header: Any, name: str, *, little: bool) -> int | None:
    """The first 16 bits of a tag, without a sign; None where it is missing or empty."""
    raw = _raw(header, name, little)
    return int.from_bytes(raw[:2], "little") if raw else None


# --- look-up tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTable:
    """A look-up table (PS3.3 C.11.1.1 and C.7.6.3.1.5).

    Attributes:
        first: the value that the first entry is for, as 16 bits without a sign; it may stand for a negative one.
        entries: shape (n,), n >= 1.
        bits: number of bits that an entry is said to have, 1..16.
        complete: whether there are as many entries as the descriptor says.
    """

    first: int
    entries: WordArray
    bits: int
    complete: bool

    @property
    def white(self) -> int:
        """The entry that is shown as white; see `full_scale`."""
        return full_scale(int(self.entries.max()), self.bits)

    def look_up(self, values: NDArray[Any]) -> WordArray:
        """The entries of `values` (any shape, whole numbers); below and above the table, its first and last entry."""
        first = self.first
        # The sign of the first value is not written in the file. It is what lets values reach the table.
        if first >= 1 << 15 and (values.min() < 0 or values.max() < first):
            first -= 1 << 16
        return self.entries[np.clip(values.astype(np.int64) - first, 0, len(self.entries) - 1)]


def read_table(item: Any, descriptor: str, data: str, *, little: bool) -> LookupTable | None:
    """The table in two tags of `item`; None where a tag is missing or empty, as if there were no table.

    Args:
        little: whether the file is little endian.
    """
    words = np.frombuffer(_raw(item, descriptor, little), "<u2")
    content = _raw(item, data, little)
    if len(words) < 3 or not content:
        return None
    count = int(words[0]) or _MOST_ENTRIES
    entries = np.frombuffer(content, "<u2")
    if len(entries) < count and len(entries) == (count + 1) // 2:
        entries = np.frombuffer(content, np.uint8)  # packed, two entries to a word
    bits = int(words[2]) if 1 <= words[2] <= 16 else max(1, int(entries.max()).bit_length())
    complete = len(entries) >= count or not words[0]  # 0 stands for 65536 entries, but is also a slip
    return LookupTable(first=int(words[1]), entries=entries[:count].astype(np.uint16), bits=bits, complete=complete)


def read_palette(header: Any, *, little: bool) -> tuple[LookupTable, LookupTable, LookupTable]:
    """The red, green and blue table of a palette colour image, plain or segmented.

    Raises:
        VolumeError: if one is missing.
    """
    tables = []
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        table = read_table(header, f"{name}Descriptor", f"{name}Data", little=little)
        tables.append(table or _read_segments(header, f"{name}Descriptor", f"Segmented{name}Data", little))
    return tables[0], tables[1], tables[2]


def _read_segments(header: Any, descriptor: str, data: str, little: bool) -> LookupTable:
    words = np.frombuffer(_raw(header, descriptor, little), "<u2")
    content = _raw(header, data, little)
    if len(words) < 3 or not content:
        raise VolumeError("its palette is missing or empty; export it as RGB")
    bits = 8 if words[2] == 8 else 16
    codes = np.frombuffer(content, "<u2" if bits == 16 else np.uint8).tolist()
    entries = np.array(expand_segments(codes, bits), np.uint16)
    count = int(words[0]) or _MOST_ENTRIES
    return LookupTable(first=int(words[1]), entries=entries[:count], bits=bits, complete=len(entries) >= count)


def expand_segments(codes: Sequence[int], bits: int) -> list[int]:
    """The entries of a segmented table (PS3.3 C.7.9.2).

    Args:
        codes: numbers of `bits` bits (8 or 16): discrete (0), linear (1) and indirect (2) segments.

    Raises:
        VolumeError: if the segments are damaged.
    """
    out: list[int] = []
    damaged = VolumeError("its palette's segments are damaged; export it as RGB")
    parts = 32 // bits  # of an offset, which counts bytes

    def expand(start: int, segments: int | None) -> None:
        """`segments` segments from `start` on, all of them if None."""
        at = start
        while segments is None or segments > 0:
            if segments is None and at + 1 >= len(codes):  # what is left pads to a whole word
                return
            kind, length = codes[at], codes[at + 1]
            at += 2
            if kind == 0:
                out.extend(codes[at : at + length])
                at += length
            elif kind == 1:
                last, end = out[-1], codes[at]
                out.extend(round(last + (end - last) * (step + 1) / length) for step in range(length))
                at += 1
            elif kind == 2 and segments is None:  # an indirect segment must not point at another
                offset = sum(code << (bits * index) for index, code in enumerate(codes[at : at + parts]))
                expand(offset * 8 // bits, length)
                at += parts
            else:
                raise damaged
            if len(out) > _MOST_ENTRIES:
                raise damaged
            segments = None if segments is None else segments - 1

    try:
        expand(0, None)
    except IndexError:
        raise damaged from None
    if not out:
        raise damaged
    return out


def _raw(item: Any, name: str, little: bool) -> bytes:
    """The bytes of a tag as 16-bit little-endian words; b"" where it is missing or empty."""
    element = item.get_item(name)
    value = None if element is None else element.value
    if value is None:
        return b""
    if isinstance(value, bytes):
        value += b"\0" * (len(value) % 2)
        return value if little else np.frombuffer(value, ">u2").astype("<u2").tobytes()
    # Read later than the rest of the header, and already converted.
    values = value if isinstance(value, Sequence) else [value]
    return np.array([int(v) & 0xFFFF for v in values], "<u2").tobytes()
