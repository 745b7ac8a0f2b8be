"""Pillow images of every kind → 8-bit RGB, or a refusal.

- grayscale and 1-bit: the value in all three channels; palette: its colours
- more than 8 bit of gray (X-ray, microscopy), with or without alpha: the selector's window, or a linear one from the
  image's minimum to its maximum; an image of one value is black
- alpha or a transparent colour: composited on black, the background of most medical images
- CMYK, YCbCr: Pillow's device formula; a colour profile in the file is not applied
- 16-bit colour: the high byte, unless the values need only 14 bits or fewer (see `full_scale`)

Every other mode (LAB, HSV) is refused. Pillow has no mode for some of what PNG and TIFF hold: 16-bit colour and 16-bit
gray with alpha lose their low byte, unsigned 32-bit and signed 8-bit gray get the wrong sign, and WhiteIsZero is
turned over in 8 bits only. `layout_of` tells these apart before decoding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitos.data.gray import FloatArray, Rendering, VolumeError, full_scale, invert, render, scale_colour
from vitos.data.tiff import (
    BITS_PER_SAMPLE,
    EXTRA_SAMPLES,
    OTHER_TAGS,
    PHOTOMETRIC,
    PLANAR_CONFIGURATION,
    SAMPLE_FORMAT,
)

_HIGH_DEPTH = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_BANDS = tuple("RGBAaCMYK")
_NATIVE = {
    "I;16S": "I;16NS",
    "I;32S": "I;32NS",
    "F;32F": "F;32NF",
    "I;16BS": "I;16NS",
    "I;32BS": "I;32NS",
    "F;32BF": "F;32NF",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a file holds that Pillow's mode does not tell.

    Attributes:
        mode: Pillow's mode, or "LA;16", "RGB;16" and "RGBA;16" where it has none.
        kind: NumPy's name of the type that gray values are to be read as; None: as Pillow has them.
        inverted: whether low values are bright although Pillow left them as they are.
        premultiplied: whether colours are multiplied by alpha already, and Pillow does not know.
        key: the transparent value or colour of a 16-bit PNG; None: it has none.
    """

    mode: str
    kind: str | None = None
    inverted: bool = False
    premultiplied: bool = False
    key: int | tuple[int, ...] | None = None


def layout_of(image: Image.Image) -> Layout:
    """The layout of an image that is open but not decoded; where need be, its decoder is told to keep all bytes."""
    if image.format == "TIFF":
        return _tiff_layout(image)
    raw = _raw_mode(image.tile[0]) if getattr(image, "tile", ()) else ""  # type: ignore[attr-defined]
    key = image.info.get("transparency") if image.format == "PNG" else None
    if raw == "LA;16B":
        # Four bytes for a pixel: high and low byte of gray, high and low byte of alpha.
        _set_raw_modes(image, lambda raw: "RGBA")
        return Layout(mode="LA;16")
    if raw.endswith(";16B") and image.mode in ("RGB", "RGBA"):
        return Layout(mode=f"{image.mode};16", key=key)
    return Layout(mode=image.mode, key=key if image.mode in _HIGH_DEPTH else None)


def _tiff_layout(image: Image.Image) -> Layout:
    """`layout_of` a TIFF; corrects what Pillow unpacks wrongly: planes of 16 bits, compressed big-endian numbers."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits, sample_format = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(SAMPLE_FORMAT, (1,))[0]
    compressed = image.tile[0].codec_name == "libtiff"  # type: ignore[attr-defined]
    planes = tags.get(PLANAR_CONFIGURATION) == 2
    if image.mode in _HIGH_DEPTH or (image.mode, bits[0], sample_format) == ("L", 8, 2):
        if compressed:  # libtiff gives numbers in the order of the machine, whatever the file's is
            _set_raw_modes(image, lambda raw: _NATIVE.get(raw, raw))
        kind = {("I", 32, 1): "uint32", ("L", 8, 2): "int8"}.get((image.mode, bits[0], sample_format))
        kind, inverted = image.info.get(OTHER_TAGS, (kind, tags.get(PHOTOMETRIC) == 0))
        return Layout(mode=image.mode, kind=kind, inverted=inverted)
    deep = set(bits) == {16} and image.mode in ("RGB", "RGBA")
    # Where Pillow does not divide by alpha, or would divide rounded numbers.
    premultiplied = tags.get(EXTRA_SAMPLES, (0,))[0] == 1 and (not compressed if planes else deep)
    if planes and not compressed:
        order = ("L" if tags.prefix == b"II" else "B") if deep else ""
        image.tile = [tile for tile in image.tile if _raw_mode(tile) in _BANDS]  # type: ignore[attr-defined]
        _set_raw_modes(image, lambda raw: f"{raw.upper()};16{order}" if deep else raw.upper())
    elif premultiplied:
        _set_raw_modes(image, lambda raw: raw.replace("a", "A"))
    return Layout(mode=f"{image.mode};16" if deep else image.mode, premultiplied=premultiplied)


def keep_low_bytes(image: Image.Image) -> None:
    """Let the decoder of a 16-bit colour image keep the low byte of each value instead of the high one.

    Raises:
        VolumeError: for compressed planes, of which Pillow gives the high byte only.
    """
    layout_of(image)
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(PLANAR_CONFIGURATION) == 2 and image.tile[0].codec_name == "libtiff":  # type: ignore[attr-defined]
            raise VolumeError("16-bit colour in compressed planes that needs few of its bits; export it uncompressed")
    other = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}
    _set_raw_modes(image, lambda raw: raw[:-3] + other.get(raw[-3:], raw[-3:]))


def to_rgb(
    image: Image.Image, layout: Layout, window: tuple[float, float] | None, low_bytes: Callable[[], Image.Image]
) -> tuple[Image.Image, Rendering, tuple[str, ...]]:
    """The RGB image, how it was made, and warnings; the result is in memory and knows no file.

    Args:
        image: decoded and upright.
        layout: as it was before decoding.
        window: (centre, width) of the selector, or None.
        low_bytes: gives the same image after `keep_low_bytes`; called only where the high bytes do not suffice.

    Raises:
        VolumeError: for a mode without a conversion, a window on colour, or gray without a finite value.
    """
    if layout.mode == "LA;16":
        cells = np.asarray(image).astype(np.uint16)
        gray, alpha = (cells[..., n] << 8 | cells[..., n + 1] for n in (0, 2))
        return _gray(gray.astype(np.float64), alpha / full_scale(int(alpha.max()), 16), layout, window)
    if layout.mode in _HIGH_DEPTH or layout.kind or (window and layout.mode == "L"):
        stored = np.asarray(image).astype(np.asarray(image).dtype.newbyteorder("="))
        values = (stored.view(layout.kind) if layout.kind else stored).astype(np.float64)
        return _gray(values, None if layout.key is None else (values != layout.key) * 1.0, layout, window)
    if window:
        raise VolumeError(f"colour mode {layout.mode} has no window; leave window out")
    if layout.mode in ("RGB;16", "RGBA;16"):
        return _deep_colour(np.asarray(image), layout, low_bytes)
    if layout.premultiplied:
        return Image.merge("RGB", image.split()[:3]), Rendering(), ()
    if image.mode in _ALPHA or (image.mode in _PLAIN and image.has_transparency_data):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"), Rendering(), ()
    if image.mode in _PLAIN:
        return image.convert("RGB"), Rendering(), ()
    raise VolumeError(f"colour mode {image.mode} has no defined conversion; export it as RGB or gray")


def _gray(
    values: FloatArray, alpha: FloatArray | None, layout: Layout, window: tuple[float, float] | None
) -> tuple[Image.Image, Rendering, tuple[str, ...]]:
    """Deep gray, composited on black where `alpha` (0..1) is not 1; what is transparent takes no part in the range."""
    gray, used, source = render(values, window, None if alpha is None else alpha > 0)
    if layout.inverted:
        gray = invert(gray, values)
    if alpha is not None:
        gray = np.rint(gray * alpha).astype(np.uint8)
    rendering = Rendering(window=used, window_source=source, inverted=layout.inverted)
    return Image.fromarray(gray).convert("RGB"), rendering, ()


def _deep_colour(
    high: NDArray[np.uint8], layout: Layout, low_bytes: Callable[[], Image.Image]
) -> tuple[Image.Image, Rendering, tuple[str, ...]]:
    """16-bit RGB or RGBA by its `high` bytes → 8 bit, composited on black where it is transparent."""
    warned: list[str] = []
    pixels = high
    if min(high[..., :3].max(), high[..., 3:].max(initial=0) or 255) < 64 or layout.key is not None:
        values = high.astype(np.uint16) << 8 | np.asarray(low_bytes())
        pixels, warned = scale_colour(values[..., :3], 16)
        if high.shape[2] == 4:
            alpha = values[..., 3:] * (255 / full_scale(int(values[..., 3].max()), 16))
            pixels = np.concatenate([pixels, np.rint(alpha).astype(np.uint8)], axis=-1)
        if layout.key is not None:
            opaque = (values[..., :3] != layout.key).any(axis=-1, keepdims=True)
            pixels = pixels * opaque.astype(np.uint8)
    if layout.mode == "RGBA;16" and not layout.premultiplied:
        pixels = np.rint(pixels[..., :3] * (pixels[..., 3:] / 255)).astype(np.uint8)
    # Colours that are multiplied by alpha are on black already.
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3])), Rendering(), tuple(warned)


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0]) if tile.args else ""


def _set_raw_modes(image: Image.Image, change: Callable[[str], str]) -> None:
    """Change how the bytes of each tile are unpacked; see `Image.frombytes` for the names of raw modes."""
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        raw = change(_raw_mode(tile))
        tiles.append(tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])))
    image.tile = tiles  # type: ignore[attr-defined]
