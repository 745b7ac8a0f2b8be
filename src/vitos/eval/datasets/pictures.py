"""Images of a release as checked files: those in parquet or zip are written to a store, those on disk stay there.

A model runs for hours, and an image that cannot be read should be known before. So each image is decoded once here,
and questions about a broken one are left out. A file in the store is named after its content and was decoded before it
was put there, so a second reading of the release decodes nothing that the store has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vitos.data.archive import Archive
from vitos.data.convert import image_suffix
from vitos.data.files import atomic_write
from vitos.data.images import DataError, ImageError, load_image, resolve_under
from vitos.eval.datasets.rows import RowError


def default_store() -> Path:
    """The folder for images from parquet and zip files: `vitos/benchmarks` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitos" / "benchmarks"


class Pictures:
    """Finds the images of one release.

    Args:
        folder: folder of the release; images are below it or in one of its archives.
        archives: zip files with images.
        inside: folders of the release or of an archive to look into, such as `imgs`; "" is the top.
        store: folder for images that are not files yet; None: `default_store`.

    Raises:
        DataError: for an archive that must not be unpacked.
    """

    def __init__(
        self, folder: Path, archives: Sequence[Path] = (), inside: Sequence[str] = ("",), store: Path | None = None
    ) -> None:
        self._folder = folder
        self._inside = inside
        self._store = store or default_store()
        self._archives = [Archive(path) for path in archives]
        self._checked: dict[Path, str] = {}  # file on disk → "", or why it cannot be used

    def close(self) -> None:
        for archive in self._archives:
            archive.close()

    def get(self, image: bytes | str) -> Path:
        """A file that `load_image` reads, with these bytes or of this name in the release.

        Raises:
            RowError: if there is none, its name leaves the folder, or it cannot be used.
        """
        try:
            if isinstance(image, bytes):
                return self._put(image, hashlib.sha256(image).hexdigest())
            return self._find(image)
        except ImageError as error:
            raise RowError(f"image {error.path.name}: {error.reason}") from error
        except DataError as error:
            raise RowError(str(error)) from error

    def _find(self, name: str) -> Path:
        for inside in self._inside:
            path = resolve_under(self._folder, str(PurePosixPath(inside) / name))
            try:
                there = path.is_file()
            except OSError as error:  # such as a name longer than the file system allows
                raise RowError(f"image {name[:40]!r} cannot be read ({error.strerror})") from error
            if there:
                return self._on_disk(path)
        wanted = [str(PurePosixPath(inside) / name) for inside in self._inside]
        for archive in self._archives:
            for member in wanted:
                if member in archive:
                    return self._unpack(archive, member)
        raise RowError(f"there is no image {name!r} in the folder or its archives")

    def _on_disk(self, path: Path) -> Path:
        if path not in self._checked:
            try:
                load_image(path)
                self._checked[path] = ""
            except ImageError as error:
                self._checked[path] = error.reason
        if reason := self._checked[path]:
            raise ImageError(path, reason)
        return path

    def _unpack(self, archive: Archive, member: str) -> Path:
        """The image's file in the store; its name follows from the archive's index, before anything is unpacked."""
        name = hashlib.sha256(f"{member}\n{archive.key(member)}".encode()).hexdigest()
        if kept := next(self._shelf(name).glob(f"{name}.*"), None):
            return kept
        return self._put(archive.read(member), name, PurePosixPath(member).name)

    def _put(self, data: bytes, name: str, label: str = "in the row") -> Path:
        """Write an image to the store unless it is there; it gets its name only after it was decoded."""
        path = self._shelf(name) / (name + image_suffix(data, Path(label)))
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
            try:
                load_image(temporary)
            except ImageError as error:
                raise ImageError(Path(label), error.reason) from error
        return path

    def _shelf(self, name: str) -> Path:
        return self._store / name[:2]
