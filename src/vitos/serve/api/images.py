"""Images of a request → RGB pictures. Nothing is fetched: they come with the request, or from the operator's folder.

Bytes go through a temporary file of a neutral name, so that one path opens all images (`data/images.py`), and neither
a name nor a header of what a user sent can stand in an error or a log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitos.data.images import DataError, ImageError, ImageFacts, load_image_facts, resolve_under
from vitos.data.nifti import is_nifti

_DATA = re.compile(r"data:(?P<type>[a-z0-9.+\-/]*)(?:;[a-z0-9=.+\-]+)*?;base64,", re.IGNORECASE)
# NIfTI is known by its name alone; everything else by its content.
_NIFTI = ("application/x-nifti", "application/nifti", "application/gzip", "application/x-gzip")


class BadImage(ValueError):
    """An image that cannot be used; the message says what to send, and nothing of what was sent."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An image of a request.

    Attributes:
        digest: of its bytes and selector: equal digests are equal pictures.
    """

    picture: Image.Image
    facts: ImageFacts
    digest: str


@dataclass(frozen=True, slots=True)
class Source:
    """How images are opened: the folder that `file:` may name (None: none), and the most pixels of one."""

    folder: Path | None
    max_pixels: int

    def open(self, url: str, select: str, attachments: Mapping[str, bytes], number: int) -> Opened:
        """Open one image.

        Args:
            attachments: files of a multipart request by name.
            number: of the image in the request, from 1, which errors name.

        Raises:
            BadImage: for an address of another kind, a name that is not there, or bytes that are no usable image.
        """
        kind, _, rest = url.partition(":")
        if kind.lower() == "data":
            match = _DATA.match(url)
            if match is None:
                raise BadImage(f"image {number}: a data URI must begin like data:image/png;base64,")
            try:
                content = base64.b64decode(url[match.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise BadImage(f"image {number}: what follows base64, is not base64") from None
            return self._from_bytes(content, match["type"].lower() in _NIFTI, select, number)
        if kind == "attachment":
            if rest not in attachments:
                raise BadImage(f"image {number}: the request has no attachment of this name")
            return self._from_bytes(attachments[rest], is_nifti(Path(rest)), select, number)
        if kind == "file":
            return self._from_folder(rest, select, number)
        raise BadImage(
            f"image {number}: addresses are not fetched; send the image as data:image/png;base64,… or as an attachment"
        )

    def _from_folder(self, name: str, select: str, number: int) -> Opened:
        if self.folder is None:
            raise BadImage(f"image {number}: this server opens no files of its own (vitos serve --images FOLDER)")
        try:
            path = resolve_under(self.folder, name.removeprefix("//"))
            content = path.read_bytes() if path.is_file() else None
        except (DataError, OSError):
            content = None
        if content is None:  # which of both is not said: names that are not there are nobody's business
            raise BadImage(f"image {number}: there is no such file below the server's folder")
        return self._from_bytes(content, is_nifti(Path(name)), select, number)

    def _from_bytes(self, content: bytes, volume: bool, select: str, number: int) -> Opened:
        digest = hashlib.sha256(content)
        digest.update(b"\0" + select.encode())
        zipped = content[:2] == b"\x1f\x8b"
        suffix = ".nii.gz" if volume and zipped else ".nii" if volume else ""
        with tempfile.TemporaryDirectory(prefix="vitos-") as folder:
            file = Path(folder, f"image{suffix}")
            file.write_bytes(content)
            try:
                named = file.with_name(f"{file.name}#{select}") if select else file
                picture, facts = load_image_facts(named, max_pixels=self.max_pixels)
            except ImageError as error:
                raise BadImage(f"image {number}: {error.reason}") from None
        return Opened(picture, facts, digest.hexdigest())
