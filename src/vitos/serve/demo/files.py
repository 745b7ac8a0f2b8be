"""The folder of the page's pictures and uploads: each file complete when it appears, none with a patient's name."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from vitos.serve.demo.inputs import file_ending

CACHE_SECONDS = 3600
"""Age at which uploads and pictures are deleted; when the demo stops, all of them are."""


class PageFolder:
    """An existing folder for the files of a page.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, picture: Image.Image) -> str:
        """Write a picture to a new PNG file, which appears under its name when it is complete; its path."""
        self._delete_old()
        handle, name = tempfile.mkstemp(dir=self.path, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG")
        final = name.removesuffix(".part") + ".png"
        os.replace(name, final)
        return final

    def discard(self, *files: str | None) -> None:
        """Delete pictures that are not shown."""
        for file in files:
            if file is not None:
                Path(file).unlink(missing_ok=True)

    def is_upload(self, file: Path) -> bool:
        """Whether a file lies where Gradio put it: in a folder of its own within ours."""
        return file.is_relative_to(self.path) and file.parent != self.path

    def without_name(self, file: Path) -> Path:
        """Move an upload to a name that does not say who a patient is; its new path."""
        moved = self.path / f"upload-{secrets.token_hex(8)}{file_ending(file)}"
        os.replace(file, moved)
        with suppress(OSError):  # the same file is being uploaded again
            file.parent.rmdir()
        return moved

    def _delete_old(self) -> None:
        """Delete pictures and uploads that are too old; Gradio does not know of all of them."""
        for file in filter(Path.is_file, self.path.glob("*")):
            with suppress(FileNotFoundError):  # deleted by another thread
                if time.time() - file.stat().st_mtime > CACHE_SECONDS:
                    file.unlink()
