"""Names of files as different systems spell them, and text that no file can hold.

A letter with a mark is one character (NFC) or a letter and its mark (NFD). They look the same, and most file systems
take them for different names. Archives packed on a Mac hold NFD, most data sets NFC.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from unicodedata import normalize

_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same but for their spelling."""
    return normalize("NFC", one) == normalize("NFC", other)


def as_spelled_on_disk(base: Path, relative: Path) -> Path:
    """`base / relative`, each part spelled as the file system has it; as it is where there is no such file.

    A part that is there just as written is taken before one that is there in another spelling.
    """
    at = base
    for part in relative.parts:
        if not part.isascii() and not os.path.lexists(at / part) and at.is_dir():
            part = _spellings(at, at.stat().st_mtime_ns).get(normalize("NFC", part), part)
        at = at / part
    return at


@lru_cache(maxsize=32)
def _spellings(folder: Path, changed: int) -> dict[str, str]:
    """NFC name → name on disk, of those that are not NFC; read again when the folder was `changed`."""
    names = sorted(name for name in os.listdir(folder) if not name.isascii())
    return {normalize("NFC", name): name for name in names}


def half_character(text: str) -> str | None:
    """The first half of a surrogate pair in a text, such as half of an emoji, escaped; None if there is none.

    JSON can write one, UTF-8 and tokenizers cannot.

    >>> half_character("nodule \\ud83d")
    '\\\\ud83d'
    """
    found = _HALF_CHARACTERS.search(text)
    return found[0].encode("ascii", "backslashreplace").decode() if found else None
