"""Images of a request → RGB pictures. Nothing is fetched: they come with the request, or from the operator's folder.

Bytes go through a temporary file with a neutral name, so that one function opens all images (`data/images.py`), and
neither the name nor a header of what a user sent can appear in an error or a log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitos.data.images import DataError, ImageError, ImageFacts, load_image_facts, resolve_under
from vitos.data.nifti import is_nifti

_DATA = re.compile(r"data:(?P<type>[a-z0-9.+\-/]*)(?:;[a-z0-9=.+\-]+)*?;base64,", re.IGNORECASE)
# Only NIfTI is known by its name or type; everything else by its content.
_NIFTI = ("application/x-nifti", "application/nifti", "application/gzip", "application/x-gzip")


class BadImage(ValueError):
    """An image that cannot be used; the message says what to send, and nothing of what was sent."""


@dataclass(frozen=True, slots=True)
class RequestImage:
    """An image of a request.

    Attributes:
        picture: the RGB picture.
        facts: how it was opened.
        digest: hash of its bytes and selector: equal digests are equal pictures.
    """

    picture: Image.Image
    facts: ImageFacts
    digest: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where images come from.

    Attributes:
        folder: folder whose files `file:NAME` may name; None: no file may be named.
        max_pixels: largest number of pixels of an image.
    """

    folder: Path | None
    max_pixels: int

    def open(self, url: str, select: str, attachments: Mapping[str, bytes]) -> RequestImage:
        """Open one image.

        Args:
            select: which picture of the file, as a selector; may be empty.
            attachments: content of each file of a multipart request, by name.

        Raises:
            BadImage: for another kind of address, a name that does not exist, or bytes that are no usable image.
        """
        content, volume = self._read(url, attachments)
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
                raise BadImage(error.reason) from None
        return RequestImage(picture, facts, digest.hexdigest())

    def _read(self, url: str, attachments: Mapping[str, bytes]) -> tuple[bytes, bool]:
        """The bytes at an address, and whether they are NIfTI."""
        kind, _, rest = url.partition(":")
        if kind.lower() == "data":
            if (match := _DATA.match(url)) is None:
                raise BadImage("a data URI must begin like data:image/png;base64,")
            try:
                return base64.b64decode(url[match.end() :], validate=True), match["type"].lower() in _NIFTI
            except (binascii.Error, ValueError):
                raise BadImage("what follows base64, is not base64") from None
        if kind == "attachment":
            if rest not in attachments:
                raise BadImage("the request has no attachment of this name")
            return attachments[rest], is_nifti(Path(rest))
        if kind == "file":
            return self._stored(rest), is_nifti(Path(rest))
        raise BadImage("addresses are not fetched; send the image as data:image/png;base64,… or as an attachment")

    def _stored(self, name: str) -> bytes:
        """The bytes of a file below the server's folder."""
        if self.folder is None:
            raise BadImage("this server opens no stored files; start it with vitos serve --images FOLDER")
        with suppress(DataError, OSError):
            path = resolve_under(self.folder, name.removeprefix("//"))
            if path.is_file():
                return path.read_bytes()
        # The same words in every case, so that a client cannot learn which files exist elsewhere.
        raise BadImage("there is no such file below the server's folder")
