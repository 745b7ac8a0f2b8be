"""Zip archives read file by file, by the names that a data set gives; nothing is unpacked into a folder.

What an archive may be is decided from its list of contents, before anything is decompressed. It is refused for a name
that leaves the folder it would be unpacked into, for a symbolic link and for an encrypted file. The unpacked size is
limited for each file and, against many names for the same bytes, for all files of an archive together.
"""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock
from types import TracebackType
from unicodedata import normalize

from vitos.data.images import DataError

MAX_FILE_BYTES = 512 << 20
# Images hardly shrink in a zip, but a bitmap of one colour does; so an archive may grow this many times and a bit more
MAX_GROWTH = 20
FREE_BYTES = 1 << 30
MAX_FILES = 2_000_000

_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, OSError)


class Archive:
    """An open zip archive. Reading from several threads is safe and waits in turn.

    Args:
        path: the file.
        max_file_bytes: refuse to unpack a file larger than this.

    Raises:
        DataError: if it is no readable zip archive, or one that must not be unpacked; it names the file.
    """

    def __init__(self, path: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.path = path
        self._max_file_bytes = max_file_bytes
        self._lock = Lock()
        try:
            self._zip = zipfile.ZipFile(path)
            self._budget = MAX_GROWTH * path.stat().st_size + FREE_BYTES
        except _BROKEN as error:
            raise DataError(f"{path}: not a readable zip archive ({error}); download it again") from error
        try:
            self._files = _check_contents(path, self._zip.infolist())
        except DataError:
            self._zip.close()
            raise
        # An archive that was packed on a Mac spells names in another way than the data set does.
        self._spelled = {normalize("NFC", name): name for name in self._files if not name.isascii()}

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files in it, without folders, in the order of the archive."""
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return self._own_name(name) in self._files

    def key(self, name: str) -> str:
        """What identifies the content of a file without reading it: its check sum and size."""
        info = self._files[self._own_name(name)]
        return f"{info.CRC:08x}-{info.file_size}"

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DataError: if it is damaged, or unpacks to more than it may.
            KeyError: if there is none of this name.
        """
        info = self._files[self._own_name(name)]
        with self._lock:
            if info.file_size > self._max_file_bytes:
                self._refuse(name, f"unpacks to {info.file_size} bytes, more than {self._max_file_bytes}")
            try:
                with self._zip.open(info) as file:
                    # The size in the list of contents is a claim: read no more than it says.
                    data = file.read(info.file_size + 1)
            except _BROKEN as error:
                self._refuse(name, f"is damaged ({error}); download the archive again")
            if len(data) != info.file_size:
                self._refuse(name, f"unpacks to another size than the {info.file_size} bytes that it claims")
            self._budget -= len(data)
            if self._budget < 0:
                raise DataError(f"{self.path}: unpacks to more than {MAX_GROWTH} times its size; it is a zip bomb")
        return data

    def _own_name(self, name: str) -> str:
        """A name as the archive spells it."""
        return name if name in self._files else self._spelled.get(normalize("NFC", name), name)

    def _refuse(self, name: str, reason: str) -> None:
        raise DataError(f"{self.path.name}/{name}: {reason}")


def _check_contents(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Name → file of an archive that may be unpacked."""
    if len(infos) > MAX_FILES:
        raise DataError(f"{path}: holds {len(infos)} files, more than {MAX_FILES}; it is no data set's archive")
    files: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        windows = PureWindowsPath(name)
        if ".." in windows.parts or PurePosixPath(name).is_absolute() or windows.anchor or "\0" in name:
            raise DataError(f"{path}: holds {name!r}, which would leave the folder; do not unpack it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: holds the symbolic link {name!r}; do not unpack it")
        if info.flag_bits & 1:
            raise DataError(f"{path}: {name!r} is encrypted; unpack it by hand and name the folder")
        if not info.is_dir():
            files[name] = info
    return files
