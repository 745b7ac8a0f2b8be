"""Pictures with more bits than Pillow's modes: each one as its numbers say, never black or turned over."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import chunk, page, png, tiff

from vitos.data.images import ImageError, load_image, load_image_facts

SHARE = np.linspace(0, 1, 64).reshape(8, 8)  # a ramp from black to white


def pixels(path):
    return np.asarray(load_image(path)).astype(int)


def gray(path):
    shown = pixels(path)
    assert (shown[..., :1] == shown).all()
    return shown[..., 0]


def ramp(kind):
    """Values of this type from its least to its largest, as `SHARE` says; floats from -1 to 2.5."""
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        return (SHARE * 3.5 - 1).astype(dtype)
    info = np.iinfo(dtype)
    steps = [info.min + round(float(share) * (info.max - info.min)) for share in SHARE.ravel()]
    return np.array(steps, dtype).reshape(SHARE.shape)


def random(peak, channels, seed=0):
    """Values 0..peak of 16 bits, both ends among them."""
    values = np.random.default_rng(seed).integers(0, peak + 1, (8, 8, channels)).astype(np.uint16)
    values[0, 0], values[7, 7] = 0, peak
    return values


# --- gray TIFF ------------------------------------------------------------------------------------------------------

KINDS = ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4"]


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_tiff_of_every_type(tmp_path, photometric, kind, order, deflated):
    path = tiff(tmp_path / "a.tif", page(ramp(kind), photometric, order=order, deflated=deflated), order=order)
    expected = np.rint(SHARE * 255)
    difference = np.abs(gray(path) - (expected if photometric else 255 - expected))
    assert difference.max() <= (1 if kind == "f2" else 0.5 + 1e-6)
    # One or eight bits, unsigned, are turned over by Pillow.
    assert load_image_facts(path)[1].rendering.inverted == (photometric == 0 and kind != "u1")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_unsigned_numbers_without_a_sample_format(tmp_path, photometric, kind, order):
    """Most writers leave out what is the default; the file has a second page, which is a thumbnail."""
    small = page(np.zeros((4, 4), np.uint8), order=order, subfile=1)
    path = tiff(tmp_path / "a.tif", page(ramp(kind), photometric, order=order, without=[339]), small, order=order)
    expected = np.rint(SHARE * 255)
    assert (gray(path) == (expected if photometric else 255 - expected)).all()


@pytest.mark.parametrize("photometric", [0, 1])
def test_a_window_on_a_gray_tiff(tmp_path, photometric):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 100
    path = tiff(tmp_path / "a.tif", page(values, photometric))
    expected = np.clip((values - 2999.5) / 4000 + 0.5, 0, 1) * 255
    shown = gray(Path(f"{path}#window=3000,4001"))
    np.testing.assert_allclose(shown, expected if photometric else 255 - expected, atol=0.5 + 1e-6)


def test_one_bit_white_is_zero(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (16, 16), np.uint8)
    Image.fromarray(mask * 255).convert("1").save(tmp_path / "a.tif", tiffinfo={262: 0}, compression="group4")
    assert (gray(tmp_path / "a.tif") == mask * 255).all()


@pytest.mark.parametrize("kind", ["f8", "u8", "i8"])
def test_types_that_pillow_does_not_read_are_refused_by_name(tmp_path, kind):
    values = np.zeros((8, 8), kind)
    with pytest.raises(ImageError, match=r"a TIFF with a layout of pixels .* export it as 8- or 16-bit gray"):
        load_image(tiff(tmp_path / "a.tif", page(values)))


@pytest.mark.parametrize("photometric", [0, 1])
def test_nan_and_infinity_in_a_float_tiff(tmp_path, photometric):
    """NaN is black, infinity the end of the range on its side, and neither takes part in the range."""
    values = ramp("f4")
    values[0, 0], values[0, 1], values[0, 2] = np.nan, -np.inf, np.inf
    path = tiff(tmp_path / "a.tif", page(values, photometric))
    rest = values.ravel()[3:].astype(float)
    expected = np.rint((rest - rest.min()) / (rest.max() - rest.min()) * 255)
    ends = [0, 0, 255] if photometric else [0, 255, 0]
    shown = gray(path).ravel()
    assert shown[:3].tolist() == ends
    assert np.abs(shown[3:] - (expected if photometric else 255 - expected)).max() <= 1
    window = gray(Path(f"{path}#window=0.75,3.5")).ravel()
    assert window[:3].tolist() == ends


def test_a_float_tiff_of_nothing_is_refused(tmp_path):
    with pytest.raises(ImageError, match="no finite value"):
        load_image(tiff(tmp_path / "a.tif", page(np.full((8, 8), np.nan, np.float32))))


# --- colour TIFF ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("peak", [255, 1023, 4095, 65535])
def test_colour_tiff_of_16_bits(tmp_path, peak, extra, order, planes, deflated):
    """Whatever of the 16 bits is used; alpha is half in one row and full in the others."""
    values = random(peak, 3 + len(extra))
    if extra:
        values[..., 3] = peak
    alpha = np.ones((8, 8, 1))
    if extra in ((1,), (2,)):
        alpha[3], values[3, :, 3] = 0.5, (peak + 1) // 2
    if extra == (1,):  # colours are multiplied by alpha already
        values[..., :3] = np.rint(values[..., :3] * alpha)
    content = page(values, 2, order=order, extra=extra, planes=planes, deflated=deflated)
    path = tiff(tmp_path / "a.tif", content, order=order)
    if planes and deflated and peak < 16384:  # Pillow gives the high bytes only
        with pytest.raises(ImageError, match=r"compressed planes .* export it uncompressed"):
            load_image(path)
        return
    expected = values[..., :3] / peak * 255 * (alpha if extra == (2,) else 1)
    np.testing.assert_allclose(pixels(path), expected, atol=1.5)
    assert ("fewer bits" in " ".join(load_image_facts(path)[1].warnings)) == (peak < 65535)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("extra", [(), (1,), (2,)])
def test_colour_tiff_of_8_bits(tmp_path, extra, planes, deflated):
    values = random(255, 3 + len(extra)).astype(np.uint8)
    alpha = values[..., 3:] / 255.0 if extra else np.ones((8, 8, 1))
    if extra == (1,):
        values[..., :3] = np.floor(values[..., :3] * alpha)
    path = tiff(tmp_path / "a.tif", page(values, 2, extra=extra, planes=planes, deflated=deflated))
    np.testing.assert_allclose(pixels(path), values[..., :3] * (alpha if extra == (2,) else 1), atol=1.5)


def test_a_dark_picture_of_8_bits_stays_dark(tmp_path):
    values = random(20, 3).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == values).all()


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 4, 5])
@pytest.mark.parametrize("first", [False, True])
def test_thumbnails_and_masks_are_no_pages(tmp_path, kind, first):
    values = ramp("u2")
    pages = [page(values), page(np.zeros((4, 4), np.uint8), subfile=kind)]
    path = tiff(tmp_path / "a.tif", *(pages[::-1] if first else pages))
    assert (gray(path) == np.rint(SHARE * 255)).all()
    assert load_image_facts(path)[1].width == 8


def test_two_pages_are_refused(tmp_path):
    for kinds in [(None, None), (2, 2), (None, 2), (1, 1)]:
        pages = [page(ramp("u1"), subfile=kind) for kind in kinds]
        with pytest.raises(ImageError, match="2 frames or pages"):
            load_image(tiff(tmp_path / "a.tif", *pages))


def test_a_thumbnail_does_not_hide_a_picture_that_is_too_large(tmp_path):
    path = tiff(tmp_path / "a.tif", page(np.zeros((4, 4), np.uint8), subfile=1), page(np.zeros((60, 60), np.uint8)))
    with pytest.raises(ImageError, match="60 x 60 is more than 100 pixels"):
        load_image(path, max_pixels=100)


# --- PNG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [255, 1023, 4095, 16383, 65535])
def test_gray_png_of_16_bits_with_alpha(tmp_path, peak):
    """Gray as in a file without alpha; half of it where alpha is half."""
    values = np.rint(SHARE * peak).astype(np.uint16)
    alpha = np.full_like(values, 65535)
    alpha[5] = 32768
    path = png(tmp_path / "a.png", np.stack([values, alpha], -1), colour=4)
    plain = gray(png(tmp_path / "b.png", values, colour=0))
    np.testing.assert_allclose(gray(path), np.where(alpha == 65535, plain, plain / 2), atol=0.51)
    assert np.abs(plain - SHARE * 255).max() <= 0.5 * 255 / peak + 0.51
    assert load_image_facts(path)[1].mode == "LA;16"


def test_alpha_of_12_bits_and_what_is_transparent(tmp_path):
    values = np.rint(SHARE * 4095).astype(np.uint16)
    alpha = np.full_like(values, 4095)
    values[3, 3], alpha[3, 3] = 60_000, 0  # takes no part in the range
    path = png(tmp_path / "a.png", np.stack([values, alpha], -1), colour=4)
    expected = np.rint(SHARE * 255)
    expected[3, 3] = 0
    assert (gray(path) == expected).all()
    window = gray(Path(f"{path}#window=2048,4096"))
    assert (window[0, 0], window[3, 3], window[7, 7]) == (0, 0, 255)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("peak", [255, 1023, 4095, 16383, 65535])
def test_colour_png_of_16_bits(tmp_path, peak, channels):
    values = random(peak, channels)
    if channels == 4:
        values[..., 3] = 65535
    path = png(tmp_path / "a.png", values, colour=2 if channels == 3 else 6)
    np.testing.assert_allclose(pixels(path), values[..., :3] / peak * 255, atol=1)
    assert ("fewer bits" in " ".join(load_image_facts(path)[1].warnings)) == (peak < 16384)


def test_alpha_of_16_bits_composites_on_black(tmp_path):
    values = random(65535, 4)
    path = png(tmp_path / "a.png", values, colour=6)
    expected = values[..., :3] / 65535 * values[..., 3:] / 65535 * 255
    np.testing.assert_allclose(pixels(path), expected, atol=2)


def test_a_transparent_value_of_16_bits(tmp_path):
    values = np.rint(SHARE * 4000).astype(np.uint16) + 500
    values[2] = 9
    path = png(tmp_path / "a.png", values, colour=0, chunks=chunk(b"tRNS", struct.pack(">H", 9)))
    shown = gray(path)
    assert (shown[2] == 0).all()
    np.testing.assert_allclose(np.delete(shown, 2, 0), np.delete(SHARE, 2, 0) * 255, atol=0.6)
    colour = random(65535, 3)
    path = png(
        tmp_path / "b.png", colour, colour=2, chunks=chunk(b"tRNS", struct.pack(">3H", *map(int, colour[3, 4])))
    )
    shown = pixels(path)
    assert (shown[3, 4] == 0).all()
    shown[3, 4] = colour[3, 4] >> 8
    np.testing.assert_allclose(shown, colour / 257, atol=1)


def test_interlaced_png_of_16_bits(tmp_path):
    """Adam7 by hand: seven passes, each of them a small picture."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    for channels, colour in ((2, 4), (3, 2)):
        values = random(4095, channels)
        if channels == 2:
            values[..., 1] = 65535
        parts = [values[y::dy, x::dx] for y, x, dy, dx in passes]
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts for row in part)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 1))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(data)
        expected = values[..., :3] if channels == 3 else values[..., :1]
        np.testing.assert_allclose(
            pixels(tmp_path / "a.png"), np.broadcast_to(expected, (8, 8, 3)) / 4095 * 255, atol=1
        )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_as_well(tmp_path, orientation):
    """The same turn as Pillow gives the picture of 8 bits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = random(255, 3)[:, :6].astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    wide = chunk(b"eXIf", exif.tobytes()[6:] if exif.tobytes().startswith(b"Exif") else exif.tobytes())
    deep = png(tmp_path / "b.png", values.astype(np.uint16), colour=2, chunks=wide)
    assert load_image_facts(deep)[1].rotated == (orientation != 1)
    assert (pixels(deep) == pixels(tmp_path / "a.png")).all()


# --- other formats --------------------------------------------------------------------------------------------------


def mpo(path, first, *others):
    first.save(path, "MPO", save_all=True, append_images=list(others))
    return path


def test_a_phones_jpeg_is_its_first_picture(tmp_path):
    """MPO: behind the picture lie a preview, a depth map or a gain map, which no viewer shows."""
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    path = mpo(tmp_path / "a.jpg", picture, Image.new("RGB", (16, 12), "red"), Image.new("L", (8, 8)))
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("MPO", 3)
    plain = io.BytesIO()
    picture.save(plain, "JPEG")
    shown, facts = load_image_facts(path)
    assert (np.asarray(shown) == np.asarray(Image.open(plain))).all()
    assert (facts.format, facts.width, facts.height) == ("MPO", 64, 48)


def test_a_phones_jpeg_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 48)).save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], exif=exif)
    assert load_image(path).size == (48, 64)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_broken_exif_block_is_left_out_and_told(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (8, 6), (9, 9, 9)).save(path, exif=b"Exif\0\0garbage", lossless=True)
    picture, facts = load_image_facts(path)
    assert picture.size == (8, 6)
    assert not facts.rotated
    assert "EXIF block is broken" in facts.warnings[0]


def test_palette_with_transparency(tmp_path):
    """One transparent entry, or an alpha for each: composited on black."""
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "P")
    image.putpalette([200, 100, 50, 10, 20, 30, 40, 80, 120, 255, 255, 255])
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels(tmp_path / "a.png")[0, :4].tolist() == [[0, 0, 0], [10, 20, 30], [40, 80, 120], [255, 255, 255]]
    image.save(tmp_path / "b.png", transparency=bytes([255, 0, 128, 64]))
    shown = pixels(tmp_path / "b.png")[0, :4]
    np.testing.assert_allclose(shown, [[200, 100, 50], [0, 0, 0], [20, 40, 60], [64, 64, 64]], atol=1)


def test_gray_of_16_bits_in_jpeg_2000_and_pgm(tmp_path):
    values = np.rint(SHARE * 4095).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.jp2", irreversible=False)
    assert np.abs(gray(tmp_path / "a.jp2") - SHARE * 255).max() <= 0.6
    header = b"P5\n8 8\n4095\n"
    (tmp_path / "a.pgm").write_bytes(header + values.astype(">u2").tobytes())
    assert np.abs(gray(tmp_path / "a.pgm") - SHARE * 255).max() <= 0.6
