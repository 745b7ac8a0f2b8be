"""Image files of all kinds: each one gives an upright RGB image or an ImageError that says why."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vitos.data import images
from vitos.data.images import DataError, ImageError, load_image, load_image_facts, resolve_under


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixel data is missing, made without Pillow."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# Conversion


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), "a.png")
    assert np.array_equal(np.asarray(load_image(path)), pixels)


def test_gray_and_palette(tmp_path):
    assert pixel(saved(tmp_path, Image.new("L", (4, 4), 77), "l.png")) == (77, 77, 77)
    assert pixel(saved(tmp_path, Image.new("1", (4, 4), 1), "one.png")) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(saved(tmp_path, palette, "p.png")) == (10, 20, 30)


def test_16_bit_window_is_linear_from_minimum_to_maximum(tmp_path):
    values = np.array([[1000, 1000, 1000], [2000, 3000, 1500]], dtype=np.uint16)
    image = load_image(saved(tmp_path, Image.fromarray(values), "a.png"))
    # by hand: (v - 1000) / 2000 * 255, to the nearest even at .5
    assert np.asarray(image)[..., 1].tolist() == [[0, 0, 0], [128, 255, 64]]
    constant = Image.fromarray(np.full((3, 3), 40000, dtype=np.uint16))
    assert pixel(saved(tmp_path, constant, "c.png")) == (0, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_window_named_behind_the_path(tmp_path, suffix):
    values = np.array([[1000, 1000, 1000], [2000, 3000, 1500]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(values), f"a.{suffix}")
    image, facts = load_image_facts(Path(f"{path}#window=1500,1001"))
    # by hand, C.11.2.1.2: (v - 1499.5) / 1000 + 0.5, clipped
    assert np.asarray(image)[..., 1].tolist() == [[0, 0, 0], [255, 255, 128]]
    assert facts.rendering.to_json() == {"window": [1500.0, 1001.0], "window_source": "selector"}
    assert load_image_facts(path)[1].rendering.to_json() == {"window": [2000.0, 2000.0], "window_source": "range"}


def test_selectors_that_do_not_fit(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4)), "a.png")
    for selector, message in [
        ("window=1,2", "colour mode RGB has no window"),
        ("frame=1", "PNG knows no frame"),
        ("axis=1&slice=1", "PNG knows no axis or slice"),
        ("zoom=2", "'zoom' selects nothing"),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(Path(f"{path}#{selector}"))
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "none.dcm#frame=1")


def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "a.nii").write_bytes(bytes(400))
    for name, package in (("a", "pydicom"), ("a.nii", "nibabel")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImageError, match=rf"needs {package}.*pip install 'vitos\["):
            load_image(tmp_path / name)


def test_alpha_is_composited_on_black(tmp_path):
    assert pixel(saved(tmp_path, Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "a.png")) == (0, 0, 0)
    half = pixel(saved(tmp_path, Image.new("RGBA", (4, 4), (200, 100, 50, 128)), "b.png"))
    assert np.allclose(half, np.array([200, 100, 50]) * 128 / 255, atol=1)
    # a transparent colour without an alpha channel (PNG tRNS)
    assert pixel(saved(tmp_path, Image.new("RGB", (4, 4), (9, 8, 7)), "c.png", transparency=(9, 8, 7))) == (0, 0, 0)


def test_cmyk_jpeg(tmp_path):
    cyan = saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "c.jpg", quality=100)
    assert np.allclose(pixel(cyan), (0, 255, 255), atol=4)
    black = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "k.jpg", quality=100)
    assert np.allclose(pixel(black), (0, 0, 0), atol=4)


def test_mode_without_conversion_is_refused(tmp_path):
    with pytest.raises(ImageError, match="colour mode LAB"):
        load_image(saved(tmp_path, Image.new("LAB", (4, 4)), "a.tif"))


# Where the bright corner is once the file is upright (EXIF 2.3); in the file it is at the top left.
CORNERS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation_moves_the_corner(tmp_path, orientation, suffix):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(pixels), f"a.{suffix}", exif=exif)
    image, facts = load_image_facts(path)
    assert image.size == (facts.width, facts.height) == ((16, 32) if orientation >= 5 else (32, 16))
    assert facts.rotated == (orientation != 1)
    bright = np.argwhere(np.asarray(image.convert("L")) > 128).mean(axis=0) / (image.height, image.width)
    assert tuple((bright[::-1] > 0.5).astype(int)) == CORNERS[orientation]


# Refusals


def test_missing_folder_and_text(tmp_path):
    with pytest.raises(ImageError, match="no such file") as caught:
        load_image(tmp_path / "none.png")
    assert caught.value.path == tmp_path / "none.png"
    assert "none.png" not in caught.value.reason
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path)
    (tmp_path / "a.png").write_text("<html>not found</html>")
    with pytest.raises(ImageError, match="not an image"):
        load_image(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match="not an image"):
        load_image(tmp_path / "empty.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path, noise, f"a.{suffix}")
    load_image(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="broken"):
        load_image(path)


@pytest.mark.parametrize("size", [(20_000, 10_000), (8001, 8000)])
def test_too_many_pixels_are_refused_without_decoding(tmp_path, monkeypatch, size):
    """200 megapixels: Pillow's guard or ours; 64.008: ours. The pixel data is missing, so decoding would say so."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ImageError, match=r"too large|more than 64000000 pixels"):
        load_image(path)


def test_pixel_limit_is_inclusive(tmp_path):
    path = saved(tmp_path, Image.new("L", (20, 10)), "a.png")
    assert load_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="20 x 10 is more than 199 pixels"):
        load_image(path, max_pixels=199)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_a_side_of_one_pixel_carries_no_evidence(tmp_path, size):
    with pytest.raises(ImageError, match="no evidence"):
        load_image(saved(tmp_path, Image.new("L", size), "a.png"))


@pytest.mark.parametrize("size", [(401, 2), (2, 401)])
def test_extreme_aspect_ratio(tmp_path, size):
    with pytest.raises(ImageError, match="200 times"):
        load_image(saved(tmp_path, Image.new("L", size), "a.png"))
    assert load_image(saved(tmp_path, Image.new("L", (400, 2)), "b.png")).size == (400, 2)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_several_frames_are_refused_with_their_number(tmp_path, suffix):
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    path = saved(tmp_path, frames[0], f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames"):
        load_image(path)
    assert load_image(saved(tmp_path, frames[0], f"one.{suffix}")).size == (8, 8)


def test_eps_is_not_opened(tmp_path):
    """Pillow decodes EPS by running Ghostscript on it."""
    with pytest.raises(ImageError, match="not an image"):
        load_image(saved(tmp_path, Image.new("RGB", (8, 8)), "a.eps"))


def test_guards_of_pillow_stay_on():
    source = Path(images.__file__).read_text()
    assert "LOAD_TRUNCATED_IMAGES" not in source
    assert "MAX_IMAGE_PIXELS" not in source
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS is not None


def _seed(image_format: str, mode: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((24, 18), 60).convert(mode).save(out, image_format)
    return out.getvalue()


SEEDS = [_seed(f, m) for f, m in [("JPEG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("TIFF", "L"), ("GIF", "P")]]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_give_an_image_or_an_image_error(tmp_path, seed, changes, data):
    content = bytearray(seed)
    for at, value in changes:
        content[at % len(content)] = value
    path = tmp_path / "fuzzed"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        image = load_image(path, max_pixels=100_000)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "images\\..\\..\\secret.png",
        "/etc/passwd",
        "C:\\secret.png",
        "\\\\server\\share\\a.png",
        "http://example.org/a.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "",
        " ",
        "a\0.png",
    ],
)
def test_names_that_reach_outside_are_refused(tmp_path, name):
    root = tmp_path / "set"
    root.mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    with pytest.raises(DataError):
        resolve_under(root, name)
    with pytest.raises(DataError):
        load_image(Path(name), root=root)


def test_symlinks_must_stay_inside(tmp_path):
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    Image.new("L", (4, 4)).save(root / "images" / "a.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "images" / "a.png")
    (root / "loop").symlink_to(root / "loop")
    # A selector behind a name must not hide the link.
    for name in ("out.png", "up/secret.png", "out.png#window=1,2", "up/secret.png#window=1,2"):
        with pytest.raises(DataError, match="symlink out of"):
            load_image(Path(name), root=root)
    assert resolve_under(root, "in.png") == (root / "images" / "a.png").resolve()
    assert load_image(Path("in.png"), root=root).size == (4, 4)
    with pytest.raises(DataError):
        load_image(Path("loop"), root=root)


@given(st.lists(st.sampled_from(["a", "..", ".", "/", "\\", "b c", "~", "ö", "C:", "http:", "//"]), max_size=6))
def test_a_resolved_path_is_always_below_the_root(parts):
    root = Path("/nowhere/set")
    try:
        path = resolve_under(root, "".join(parts))
    except DataError:
        return
    assert os.path.commonpath([os.path.normpath(path), root]) == str(root)
