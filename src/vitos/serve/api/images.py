"""Images of a request → RGB pictures. Nothing is fetched: they come with the request, or from the operator's folder.

Bytes go through a temporary file with a neutral name, so that one function opens all images (`data/images.py`), and
neither the name nor a header of what a user sent can appear in an error or a log. `open_all` runs in a process, which
can be ended: no thread can be stopped in the middle of a decoder.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitos.data.images import DataError, ImageError, ImageFacts, load_image_facts, resolve_under
from vitos.data.nifti import is_nifti

_DATA = re.compile(r"data:(?P<type>[a-z0-9.+\-/]*)(?:;[a-z0-9=.+\-]+)*?;base64,", re.IGNORECASE)
# Only NIfTI is known by its name or type; everything else by its content.
_NIFTI = ("application/x-nifti", "application/nifti", "application/gzip", "application/x-gzip")
_SPACES = re.compile(r"[ \t\r\n]+")
_PIECE = 1 << 20

MAX_UNPACKED = 512 << 20
"""Largest number of bytes of all files of a request together; of a `.nii.gz`, those that it holds."""


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
class ImageFile:
    """A file of a request before it is opened.

    Attributes:
        content: the bytes, or the path of a file below the operator's folder.
        volume: it is NIfTI.
        select: which picture of the file, as a selector; may be empty.
    """

    content: bytes | Path
    volume: bool
    select: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where images come from.

    Attributes:
        folder: folder whose files `file:NAME` may name; None: no file may be named.
    """

    folder: Path | None

    def find(self, url: str, select: str, attachments: Mapping[str, bytes]) -> ImageFile:
        """The file at an address, not opened yet.

        Args:
            select: which picture of the file, as a selector; may be empty.
            attachments: content of each file of a multipart request, by name.

        Raises:
            BadImage: for another kind of address, a name that does not exist, or text that is not base64.
        """
        kind, _, rest = url.partition(":")
        if kind.lower() == "data":
            if (match := _DATA.match(url)) is None:
                raise BadImage("a data URI must begin like data:image/png;base64,")
            return ImageFile(_decoded(url[match.end() :]), match["type"].lower() in _NIFTI, select)
        if kind == "attachment":
            if rest not in attachments:
                raise BadImage("the request has no attachment of this name")
            return ImageFile(attachments[rest], is_nifti(Path(rest)), select)
        if kind == "file":
            return ImageFile(self._stored(rest), is_nifti(Path(rest)), select)
        raise BadImage("addresses are not fetched; send the image as data:image/png;base64,… or as an attachment")

    def _stored(self, name: str) -> Path:
        """The path of a file below the server's folder."""
        if self.folder is None:
            raise BadImage("this server opens no stored files; start it with vitos serve --images FOLDER")
        with suppress(DataError, OSError):
            path = resolve_under(self.folder, name.removeprefix("//"))
            if path.is_file():
                return path
        # The same words in every case, so that a client cannot learn which files exist elsewhere.
        raise BadImage("there is no such file below the server's folder")


def open_all(files: Sequence[ImageFile], folder: Path, max_pixels: int) -> list[RequestImage]:
    """Open the images of a request.

    Args:
        folder: an empty folder for what is being opened; the caller removes it.
        max_pixels: largest number of pixels of all images together.

    Raises:
        BadImage: for bytes that are no usable image, too many pixels, or more than `MAX_UNPACKED` bytes; names the
            image by its number.
    """
    opened: list[RequestImage] = []
    pixels, room = max_pixels, MAX_UNPACKED
    for number, file in enumerate(files, 1):
        try:
            image, size = _open(file, folder, max_pixels, room)
            pixels, room = pixels - image.facts.width * image.facts.height, room - size
            if pixels < 0:
                raise BadImage(f"the images of a request may have {max_pixels} pixels together; send smaller or fewer")
        except BadImage as error:
            raise BadImage(f"image {number}: {error}") from None
        opened.append(image)
    return opened


def _open(file: ImageFile, folder: Path, max_pixels: int, room: int) -> tuple[RequestImage, int]:
    """One image, and the number of bytes of its file, unpacked."""
    path = folder / ("image.nii" if file.volume else "image")
    digest = hashlib.sha256()
    with io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content.open("rb") as packed:
        zipped = file.volume and packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        with path.open("wb") as out:
            size = 0
            source = gzip.GzipFile(fileobj=packed) if zipped else packed
            try:
                while piece := source.read(_PIECE):
                    size += len(piece)
                    if size > room:
                        wanted = f"the files of a request may hold {MAX_UNPACKED >> 20} MiB together, unpacked"
                        raise BadImage(f"{wanted}; send the slice instead of the volume")
                    digest.update(piece)
                    out.write(piece)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                raise BadImage("broken or truncated; compress it again") from None
    digest.update(b"\0" + file.select.encode())
    try:
        named = path.with_name(f"{path.name}#{file.select}") if file.select else path
        picture, facts = load_image_facts(named, max_pixels=max_pixels)
    except ImageError as error:
        raise BadImage(error.reason) from None
    finally:
        path.unlink()
    return RequestImage(picture, facts, digest.hexdigest()), size


def _decoded(text: str) -> bytes:
    """The bytes of base64, with or without line breaks and padding."""
    text = _SPACES.sub("", text).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadImage("what follows base64, is not base64") from None
