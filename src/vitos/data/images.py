"""Image files → upright 8-bit RGB, or a refusal that says what is wrong with the file.

The one path by which training, evaluation and `ask` open images. DICOM is known by its content (`data/dicom.py`),
NIfTI by its name (`data/nifti.py`), everything else is Pillow's (`data/modes.py`, `data/tiff.py`); a name may select a
frame, slice or window (`data/picture.py`). What a file may be is decided from its header, before a pixel is decoded.

Pillow's own limits (decompression bomb, PNG text) stay on, and formats that start other programs (EPS) stay closed.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, touched_pixels
from vitos.data.dicom import is_dicom, read_frame
from vitos.data.gray import Rendering, VolumeError, render
from vitos.data.modes import keep_low_bytes, layout_of, to_rgb
from vitos.data.names import as_spelled_on_disk
from vitos.data.nifti import is_nifti, read_slice
from vitos.data.picture import PictureSelector, parse_selector, split_name
from vitos.data.tiff import STARTS as TIFF_STARTS
from vitos.data.tiff import full_pages, open_with_other_tags

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")

_URL = re.compile(r"[a-z][a-z0-9+.\-]*:/|data:|file:", re.IGNORECASE)

# What Pillow's decoders raise on broken bytes: besides OSError, whatever their parsing of a header runs into.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)


class DataError(ValueError):
    """A data set cannot be used as it is. The message names the file, the sample and the field, and what to do."""


class ImageError(DataError):
    """An image cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it and what to do, without the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What a file held before conversion, and how it was converted.

    Attributes:
        format: Pillow's name of the format, DICOM or NIFTI.
        mode: the colour mode (see `Layout`), DICOM's photometric interpretation, or the data type of a volume.
        width, height: the size in pixels of the upright stored image, not of a crop; boxes are fractions of it.
        rotated: whether an EXIF tag turned it.
        rendering: frame or slice, window and crop.
        warnings: what a user should look at, without a value of a header.
    """

    format: str
    mode: str
    width: int
    height: int
    rotated: bool
    rendering: Rendering
    warnings: tuple[str, ...] = ()

    @property
    def shown(self) -> Rect:
        """The part of the stored image that the picture shows."""
        return Rect(*self.rendering.crop) if self.rendering.crop else WHOLE_IMAGE

    def summary(self) -> str:
        """One line: "DICOM MONOCHROME2, 512 x 512, frame 3, window 40,400 (file)"."""
        shown = self.rendering
        parts = [f"{self.format} {self.mode}, {self.width} x {self.height}"]
        parts += [f"{k} {v}" for k in ("frame", "axis", "slice") if (v := getattr(shown, k)) is not None]
        if shown.window is not None:
            parts.append(f"window {shown.window[0]:g},{shown.window[1]:g} ({shown.window_source})")
        if shown.crop is not None:
            parts.append(f"crop {','.join(f'{edge:.3g}' for edge in shown.crop)}")
        return ", ".join(parts + ["inverted"] * shown.inverted)

    def to_json(self) -> dict[str, Any]:
        """The JSON that is kept with results."""
        return asdict(self) | {"rendering": self.rendering.to_json(), "warnings": list(self.warnings)}


def resolve_under(root: Path, relative: str | Path) -> Path:
    """The absolute path of `relative` below the folder `root`, symlinks resolved; the file need not exist.

    A path in data is a name, not a permission: it reaches nothing outside of the data set's folder. A selector
    (`#frame=3`) stays behind it. A name is found in either Unicode spelling (`as_spelled_on_disk`).

    Raises:
        DataError: for an absolute path (of any system), `..`, a URL, or a symlink that leads out of `root`.
    """
    text = str(relative)
    windows = PureWindowsPath(text)  # splits at both kinds of slash
    if _URL.match(text):
        raise DataError(f"{text!r} is a URL; download the file and give its path below {root}")
    if not text.strip() or "\0" in text:
        raise DataError(f"{text!r} is not a file name; give a path below {root}")
    if PurePosixPath(text).is_absolute() or windows.anchor:
        raise DataError(f"{text!r} is an absolute path; give it relative to {root}")
    if ".." in windows.parts:
        raise DataError(f"{text!r} holds '..'; give a path that stays below {root}")
    try:
        base = root.resolve()
        file, selector = split_name(text)  # or a symlink would hide behind its selector
        path = as_spelled_on_disk(base, file).resolve()
    except UnicodeEncodeError as error:
        raise DataError(f"{text!a} holds half a character; correct the name") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks, up to Python 3.12
        raise DataError(f"{text!r} cannot be resolved below {root}: {error}") from error
    if not path.is_relative_to(base):
        raise DataError(f"{text!r} is a symlink out of {root}; copy the file there")
    return path.with_name(f"{path.name}#{selector}") if selector else path


def load_image(path: Path, root: Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB image of a file, as evidence boxes refer to it; of a name with `crop`, that part of it only.

    Args:
        path: the file, with a selector if need be; with `root`, relative to it, which it must not leave (see
            `resolve_under`).
        root: the folder of the data set.
        max_pixels: refuse larger images by their header. Pillow's own guard refuses above about 179 million.

    Raises:
        ImageError: missing, not an image, truncated, too many pixels, a side of 1 pixel, an aspect ratio above 200,
            several frames or pages of which none is named, a colour mode that has no conversion, a selector that
            does not fit the file, or a format whose extra is not installed.
        DataError: `path` is no path below `root`.
    """
    return load_image_facts(path, root, max_pixels)[0]


def load_image_facts(
    path: Path, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, ImageFacts]:
    """`load_image`, and what the file held before conversion."""
    name = resolve_under(root, path) if root is not None else path
    path, text = split_name(name)
    try:
        selector = parse_selector(text)
    except ValueError as error:
        raise ImageError(name, str(error)) from error
    with _open(path) as file:
        start = file.read(132)
        file.seek(0)
        medical = is_dicom(start) or is_nifti(path)
        if not medical:
            picture, facts = _load_with_pillow(file, path, name, selector, max_pixels)
    if medical:
        try:
            picture, facts = _load_medical(path, name, selector, max_pixels, is_dicom(start))
        except VolumeError as error:
            raise ImageError(name, str(error)) from None
    return _cut(picture, facts, selector.crop, name) if selector.crop else (picture, facts)


def _open(path: Path) -> IO[bytes]:
    try:
        is_file = path.is_file()  # neither a folder nor a pipe, which would block
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    if not is_file:
        raise ImageError(path, "there is no such file; check the path and that the images were downloaded")
    try:
        return path.open("rb")
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror}); check its permissions") from error


def _load_with_pillow(
    file: IO[bytes], path: Path, name: Path, selector: PictureSelector, max_pixels: int
) -> tuple[Image.Image, ImageFacts]:
    if path.suffix.lower() in (".dcm", ".dicom"):
        problem = "is named as DICOM, but holds no DICOM file (no DICM mark at byte 128)"
        raise ImageError(path, f"{problem}; rename it to what it is, or export it with its preamble")
    with open_header(file, path, max_pixels) as image:
        try:
            kind, layout = image.format or "", layout_of(image)
            upright, rotated, warned = _upright(image)
        except (MemoryError, *_BROKEN) as error:
            raise ImageError(path, f"broken or truncated ({error}); download or export it again") from error
    if unused := selector.unused("window"):
        raise ImageError(name, f"{kind} knows no {' or '.join(unused)}; leave it out")

    def low_bytes() -> Image.Image:
        with open_header(file, path, max_pixels) as again:
            keep_low_bytes(again)
            return _upright(again)[0]

    try:
        picture, rendering, more = to_rgb(upright, layout, selector.window, low_bytes)
    except VolumeError as error:
        raise ImageError(name, str(error)) from None
    size = {"width": upright.width, "height": upright.height}
    facts = ImageFacts(
        format=kind, mode=layout.mode, **size, rotated=rotated, rendering=rendering, warnings=(*warned, *more)
    )
    return picture, facts


def _upright(image: Image.Image) -> tuple[Image.Image, bool, tuple[str, ...]]:
    """Decode an image and turn it as its EXIF tag says; whether that did anything, and warnings."""
    try:
        # Before decoding: Pillow turns TIFF by itself and takes the tag away.
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except (MemoryError, *_BROKEN):  # viewers show such a file as it is stored
        return image.copy(), False, ("its EXIF block is broken and was left out; make sure that it is upright",)
    return ImageOps.exif_transpose(image), rotated, ()  # decodes, and copies even where there is nothing to turn


def _load_medical(
    path: Path, name: Path, selector: PictureSelector, max_pixels: int, dicom: bool
) -> tuple[Image.Image, ImageFacts]:
    """A frame of a DICOM file or a slice of a NIfTI one."""
    kind = "DICOM" if dicom else "NIFTI"
    if unused := selector.unused("window", *(("frame",) if dicom else ("axis", "slice"))):
        raise ImageError(name, f"{kind} knows no {' or '.join(unused)}; leave it out")

    def check_size(width: int, height: int) -> None:
        _check_size(path, width, height, max_pixels)

    if dicom:
        frame = read_frame(path, selector, check_size)
        pixels, mode, rendering, warned = frame.pixels, frame.interpretation, frame.rendering, frame.warnings
    else:
        values, mode = read_slice(path, selector, check_size)
        pixels, window, source = render(values, selector.window)
        rendering = Rendering(axis=selector.axis, slice=selector.slice, window=window, window_source=source)
        warned = ()
    image = Image.fromarray(pixels).convert("RGB")
    size = {"width": image.width, "height": image.height}
    return image, ImageFacts(format=kind, mode=mode, **size, rotated=False, rendering=rendering, warnings=warned)


def _cut(picture: Image.Image, facts: ImageFacts, crop: Box, name: Path) -> tuple[Image.Image, ImageFacts]:
    """Cut out every pixel that `crop` touches; the facts say which those are."""
    width, height = picture.size
    left, top, right, bottom = touched_pixels(crop, width, height)
    _check_size(name, right - left, bottom - top, width * height)
    edges = (left / width, top / height, right / width, bottom / height)
    part = picture.crop((left, top, right, bottom))
    return part, replace(facts, rendering=replace(facts.rendering, crop=edges))


def open_header(file: IO[bytes], path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image and check what its header says, without decoding it; `path` is only named in errors.

    Raises:
        ImageError: see `load_image`.
    """
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    image: Image.Image | None
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        image = open_with_other_tags(file) if start in TIFF_STARTS else None
        if image is None:
            raise ImageError(path, _unknown(start)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, f"too large for Pillow's decompression guard ({error}); scale it down") from error
    except (MemoryError, *_BROKEN) as error:
        raise ImageError(path, f"its header is broken ({error}); download or export it again") from error
    _check_size(path, *image.size, max_pixels)
    try:
        frames = getattr(image, "n_frames", 1)
        if (
            image.format == "MPO"
        ):  # a phone's JPEG: behind the picture are previews, depth or gain, which no viewer shows
            frames = 1
        elif image.format == "TIFF" and frames > 1:
            frames = len(full_pages(image, frames))
    except _BROKEN as error:
        raise ImageError(path, f"its frames cannot be counted ({error}); export one of them") from error
    if frames != 1:
        raise ImageError(path, f"{frames} frames or pages; save the one that the question is about as its own file")
    _check_size(path, *image.size, max_pixels)
    return image


def _unknown(start: bytes) -> str:
    if start in TIFF_STARTS:
        return "a TIFF with a layout of pixels that Pillow cannot read; export it as 8- or 16-bit gray, or 8-bit RGB"
    return f"not an image of a known format ({', '.join(FORMATS)})"


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(path, f"{width} x {height} is more than {max_pixels} pixels; scale it down or cut tiles")
    if min(width, height) < 2:
        raise ImageError(path, f"{width} x {height} carries no evidence; both sides must be at least 2 pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(path, f"{width} x {height} is more than {MAX_ASPECT_RATIO} times longer than narrow; crop it")
