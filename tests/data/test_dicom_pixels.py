"""The way from stored pixels to gray and colour, against the standard's formulas and pydicom's own functions."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitos.data.gray import VolumeError
from vitos.data.images import ImageError, load_image, load_image_facts

pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")

# What these files are like is what pydicom warns of when it writes them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: E402
from tests.data.dicom_files import gray, item, ramp, shipped, table, write  # noqa: E402

from vitos.data.dicom_header import expand_segments, numbers  # noqa: E402
from vitos.data.dicom_pixels import PixelFormat, stored_values  # noqa: E402

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
ENDS = (0, 2048, 4095)  # start, middle and end of a ramp of 12 bits

every_syntax = pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)


def ramp12(dtype=np.uint16):
    return np.arange(4096, dtype=dtype).reshape(64, 64)


def ends(path):
    """Gray at the start, the middle and the end of the picture."""
    shown = gray(path).ravel()
    return [int(shown[at]) for at in ENDS]


def warned(path):
    return " ".join(load_image_facts(path)[1].warnings)


# --- look-up tables -------------------------------------------------------------------------------------------------

IDENTITY = list(range(4096))
EIGHT = [value >> 4 for value in IDENTITY]
TABLES = {
    "12 bits": (IDENTITY, 12, 4096),
    "16 bits, full": ([value * 16 + 15 for value in IDENTITY], 16, 4096),
    "8 bits in words": (EIGHT, 8, 4096),
    "8 bits packed in bytes": (bytes(EIGHT), 8, 4096),
    "12-bit entries called 16 bits": (IDENTITY, 16, 4096),
    "8-bit entries called 16 bits": (EIGHT, 16, 4096),
    "8-bit entries called 12 bits": (EIGHT, 12, 4096),
    "8-bit entries packed, called 16 bits": (bytes(EIGHT), 16, 4096),
    "12-bit entries called 8 bits": (IDENTITY, 8, 4096),
    "65536 entries, written as 0": ([min(v, 4095) for v in range(65536)], 12, 0),
    "no number of entries": (IDENTITY, 12, 0),
    "no number of bits": (IDENTITY, 0, 4096),
}


@every_syntax
@pytest.mark.parametrize("name", TABLES)
def test_a_voi_table_of_every_form_shows_a_ramp(tmp_path, name, syntax):
    entries, bits, count = TABLES[name]
    if isinstance(entries, bytes) and not syntax.is_little_endian:
        entries = np.frombuffer(entries, "<u2").astype(">u2").tobytes()  # bytes are swapped within words
    path = write(tmp_path / "a", ramp12(), syntax=syntax, VOILUTSequence=table(entries, bits, count=count))
    assert ends(path) == [0, 128, 255]
    # In between as well: no entry is further than the rounding of an 8-bit table from its place.
    assert np.abs(gray(path).ravel() - np.arange(4096) / 4095 * 255).max() <= 1
    rendering = load_image_facts(path)[1].rendering
    assert (rendering.window, rendering.window_source) == (None, "file")
    assert ("smaller entries" in warned(path)) == ("called 1" in name)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("first", [0, 7, 1000])
def test_a_voi_table_as_pydicom_applies_it(tmp_path, bits, first):
    """With 8-bit entries pydicom wraps around where values lie 256 or more above the first; the others are right."""
    entries = (np.random.default_rng(bits).integers(0, 1 << bits, 200) | 1 << (bits - 1)).tolist()
    values = ramp(np.uint16, 0, 20) if bits > 8 else ramp(np.uint16, first, 3)
    path = write(tmp_path / "a", values, VOILUTSequence=table(entries, bits, first=first))
    expected = apply_voi(values.astype(np.int32), pydicom.dcmread(path)).astype(float) / (2**bits - 1) * 255
    np.testing.assert_allclose(gray(path), expected, atol=0.5 + 1e-6)


def test_a_dark_voi_table_is_not_a_narrow_one(tmp_path):
    """Its brightest entry is half of white: that is said by the table, and so it stays."""
    path = write(tmp_path / "a", ramp12(), VOILUTSequence=table([v // 2 for v in IDENTITY], 12))
    assert ends(path) == [0, 64, 127]
    assert warned(path) == ""


@every_syntax
@pytest.mark.parametrize("first", [-2048, -1, 0, 5, 2000, 40_000])
def test_the_first_value_of_a_table_has_the_sign_that_the_values_have(tmp_path, first, syntax):
    values = (np.arange(100).reshape(10, 10) + first).astype(np.int32 if first > 32767 else np.int16)
    values = values.astype(np.uint16) if first >= 0 else values
    entries = [index * 41 for index in range(100)]
    path = write(tmp_path / "a", values, syntax=syntax, VOILUTSequence=table(entries, 12, first=first))
    np.testing.assert_allclose(gray(path).ravel(), np.array(entries) / 4095 * 255, atol=0.5 + 1e-6)


def test_a_first_value_below_zero_after_rescale(tmp_path):
    """Unsigned pixels, Hounsfield units, a table that begins at -1000: 64536 in the descriptor."""
    values = np.arange(100, dtype=np.uint16).reshape(10, 10) * 20
    voi = table([index * 16 for index in range(256)], 12, first=-1000)
    path = write(tmp_path / "a", values, VOILUTSequence=voi, RescaleSlope=1, RescaleIntercept=-1024)
    index = np.clip(values.astype(int) - 1024 + 1000, 0, 255)
    np.testing.assert_allclose(gray(path), index * 16 / 4095 * 255, atol=0.5 + 1e-6)


@pytest.mark.parametrize(
    "empty",
    [
        Sequence([]),
        Sequence([item()]),
        Sequence([item(LUTDescriptor=[4096, 0, 12])]),
        Sequence([item(LUTData=[1, 2, 3])]),
        Sequence([item(LUTDescriptor=[4096, 0, 12], LUTData=b"")]),
    ],
    ids=["no item", "empty item", "no data", "no descriptor", "empty data"],
)
def test_an_empty_table_is_no_table(tmp_path, empty):
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    path = write(tmp_path / "a", ramp12(), VOILUTSequence=empty, **tags)
    assert ends(path) == [0, 128, 255]
    assert load_image_facts(path)[1].rendering.window == (2048.0, 4096.0)
    path = write(tmp_path / "b", ramp12(), ModalityLUTSequence=empty, RescaleSlope=2, RescaleIntercept=-4096, **tags)
    assert ends(path) == [0, 0, 255]  # -4096, 0 and 4094


def test_the_first_table_that_can_be_used(tmp_path):
    voi = Sequence([item(), *table(IDENTITY[::-1], 12)])
    assert ends(write(tmp_path / "a", ramp12(), VOILUTSequence=voi)) == [255, 127, 0]


def test_a_short_table_is_told(tmp_path):
    path = write(tmp_path / "a", ramp12(), VOILUTSequence=table([*IDENTITY[:4000], 4095], 12, count=4096))
    assert ends(path) == [0, 128, 255]
    assert "fewer entries" in warned(path)


@every_syntax
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("first", [0, -300, 300])
def test_a_modality_table_gives_its_entries(tmp_path, bits, first, syntax):
    """By hand: entry of the pixel, then the window; below and above, the first and last entry."""
    entries = np.linspace(0, 2**bits - 1, 600).astype(int)[::-1].tolist()
    values = ramp(np.int16, -400, 15)
    modality = table(entries, bits, first=first)
    modality[0].ModalityLUTType = "US"
    centre, width = 2 ** (bits - 1), 2**bits
    tags = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": "LINEAR_EXACT"}
    path = write(tmp_path / "a", values, syntax=syntax, ModalityLUTSequence=modality, **tags)
    looked_up = np.array(entries)[np.clip(values.astype(int) - first, 0, 599)]
    expected = np.clip((looked_up - centre) / width + 0.5, 0, 1) * 255
    np.testing.assert_allclose(gray(path), expected, atol=0.5 + 1e-6)
    if bits in (8, 16) and first >= 0 and syntax == ExplicitVRLittleEndian:
        np.testing.assert_array_equal(apply_modality_lut(values, pydicom.dcmread(path)), looked_up)


def test_a_modality_table_of_12_bits_without_a_window(tmp_path):
    path = write(tmp_path / "a", ramp12(), ModalityLUTSequence=table(IDENTITY, 12))
    assert ends(path) == [0, 128, 255]


# --- rescale and windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "slope", "intercept"),
    [
        ({"RescaleSlope": b"", "RescaleIntercept": b""}, 1, 0),
        ({"RescaleSlope": b"2 ", "RescaleIntercept": b""}, 2, 0),
        ({"RescaleSlope": b"", "RescaleIntercept": b"-1024 "}, 1, -1024),
        ({"RescaleIntercept": b"-1024 "}, 1, -1024),
        ({"RescaleSlope": b"0.5\\3.0 ", "RescaleIntercept": b"10\\20 "}, 0.5, 10),
        ({"RescaleSlope": b" 1.5 ", "RescaleIntercept": b" +7 "}, 1.5, 7),
        ({"RescaleSlope": b"1,5 ", "RescaleIntercept": b"-7,25 "}, 1.5, -7.25),
        ({"RescaleSlope": b"15E-1 ", "RescaleIntercept": b"-.5"}, 1.5, -0.5),
        ({"RescaleSlope": b"1.00000000000000000 ", "RescaleIntercept": b"0.\0"}, 1, 0),
        ({"RescaleSlope": b"-1", "RescaleIntercept": b"4095"}, -1, 4095),
    ],
)
def test_slopes_and_intercepts_as_they_are_written(tmp_path, raw, slope, intercept):
    values = ramp12()
    path = write(tmp_path / "a", values, WindowCenter=500, WindowWidth=3001, raw=raw)
    expected = np.clip((values.astype(float) * slope + intercept - 499.5) / 3000 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(gray(path), expected, atol=0.5 + 1e-6)
    assert warned(path) == ""


def test_a_slope_of_zero_is_left_out_and_told(tmp_path):
    path = write(tmp_path / "a", ramp12(), RescaleSlope=0, RescaleIntercept=5)
    assert ends(path) == [0, 128, 255]
    assert "RescaleSlope is 0" in warned(path)


@pytest.mark.parametrize("value", [b"abc ", b"1.2.3 ", b"nan ", b"inf ", b"1,234.5 ", b"1e999 "])
def test_a_slope_that_is_no_number_is_refused_without_quoting_it(tmp_path, value):
    path = write(tmp_path / "a", ramp12(), raw={"RescaleSlope": value, "RescaleIntercept": b"0 "})
    with pytest.raises(ImageError, match="its RescaleSlope is no number") as caught:
        load_image(path)
    assert value.decode().strip() not in str(caught.value).replace("vitos", "")


@pytest.mark.parametrize(
    ("centre", "width", "window"),
    [
        (b"40", b"400 ", (40, 400)),
        (b"40,5", b"400,0 ", (40.5, 400)),
        (b"40\\600", b"400\\1500", (40, 400)),
        (b" 40 \\ 600", b" 400 \\1500", (40, 400)),
        (b"\\600", b"\\1500 ", (600, 1500)),
        (b"40\\600", b"0\\1500", (600, 1500)),
        (b"40\\600", b"400 ", (40, 400)),
        (b"4E1 ", b"4.0e+2", (40, 400)),
        (b"40\0\0", b"400\0", (40, 400)),
    ],
)
def test_the_first_window_that_can_be_used(tmp_path, centre, width, window):
    values = ramp()
    path = write(tmp_path / "a", values, raw={"WindowCenter": centre, "WindowWidth": width})
    facts = load_image_facts(path)[1]
    assert facts.rendering.window == window
    expected = np.clip((values - (window[0] - 0.5)) / (window[1] - 1) + 0.5, 0, 1) * 255
    np.testing.assert_allclose(gray(path), expected, atol=0.5 + 1e-6)
    assert facts.warnings == ()


@pytest.mark.parametrize(
    ("centre", "width", "function"),
    [(b"40", b"0 ", b"LINEAR"), (b"40", b"-400", b"LINEAR"), (b"ab", b"400 ", b"LINEAR"), (b"40", b"400 ", b"CUBIC ")],
)
def test_a_window_that_cannot_be_used_is_told(tmp_path, centre, width, function):
    raw = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function}
    path = write(tmp_path / "a", ramp12(), raw=raw)
    assert ends(path) == [0, 128, 255]
    assert "window cannot be used" in warned(path)


def test_numbers_in_binary(tmp_path):
    """Some writers give a window another type than the standard's text."""
    path = write(tmp_path / "a", ramp12())
    data = pydicom.dcmread(path)
    for name, value in (("WindowCenter", 100.5), ("WindowWidth", 300.0)):
        tag = pydicom.tag.Tag(name)
        raw = np.array([value], "<f8").tobytes()
        data[tag] = pydicom.dataelem.RawDataElement(tag, "FD", 8, raw, 0, False, True)
    data.save_as(path)
    assert load_image_facts(path)[1].rendering.window == (100.5, 300.0)


def test_an_empty_window_is_none(tmp_path):
    path = write(tmp_path / "a", ramp12(), raw={"WindowCenter": b"", "WindowWidth": b"", "VOILUTFunction": b""})
    assert ends(path) == [0, 128, 255]
    assert warned(path) == ""


@pytest.mark.parametrize("function", ["LINEAR", "linear_exact ", "SIGMOID"])
def test_functions_by_the_formulas_of_the_standard(tmp_path, function):
    """C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, for each pixel by itself."""
    values = ramp()
    path = write(tmp_path / "a", values, WindowCenter=40, WindowWidth=400, VOILUTFunction=function)

    def shown(x):
        if function == "SIGMOID":
            return 255 / (1 + np.exp(-4 * (x - 40) / 400))
        c, w = (39.5, 399) if function == "LINEAR" else (40, 400)
        return 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255

    expected = [[shown(float(x)) for x in row] for row in values]
    np.testing.assert_allclose(gray(path), expected, atol=0.5 + 1e-6)


def test_a_frames_group_that_is_empty_leaves_it_to_the_shared_one_and_the_header(tmp_path):
    groups = Sequence([item(FrameVOILUTSequence=Sequence([item(WindowCenter="", WindowWidth="")]))])
    shared = Sequence([item(FrameVOILUTSequence=Sequence([item(WindowCenter=2048, WindowWidth=4096)]))])
    path = write(
        tmp_path / "a", ramp12(), PerFrameFunctionalGroupsSequence=groups, SharedFunctionalGroupsSequence=shared
    )
    assert load_image_facts(path)[1].rendering.window == (2048.0, 4096.0)
    path = write(tmp_path / "b", ramp12(), PerFrameFunctionalGroupsSequence=groups, WindowCenter=100, WindowWidth=200)
    assert load_image_facts(path)[1].rendering.window == (100.0, 200.0)


def test_a_table_in_the_group_of_a_frame(tmp_path):
    groups = Sequence([item(FrameVOILUTSequence=Sequence([item(VOILUTSequence=table(IDENTITY[::-1], 12))]))])
    path = write(tmp_path / "a", ramp12(), PerFrameFunctionalGroupsSequence=groups, WindowCenter=1, WindowWidth=2)
    assert ends(path) == [255, 127, 0]


def test_monochrome1_is_inverted_after_a_table_too(tmp_path):
    path = write(tmp_path / "a", ramp12(), "MONOCHROME1", VOILUTSequence=table(EIGHT, 8))
    assert ends(path) == [255, 127, 0]
    assert ends(write(tmp_path / "b", ramp12(), "monochrome1 ")) == [255, 127, 0]


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from([".", ","]))
@settings(max_examples=50)
def test_any_number_is_read_back(value, mark):
    text = f"{value:.6f}".replace(".", mark).encode()
    raw = pydicom.dataelem.RawDataElement(pydicom.tag.Tag("WindowCenter"), "DS", len(text), text, 0, False, True)
    assert numbers(pydicom.Dataset({raw.tag: raw}), "WindowCenter") == [float(f"{value:.6f}")]


# --- bits -----------------------------------------------------------------------------------------------------------


@every_syntax
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("allocated", "stored", "high"), [(16, 12, 11), (16, 12, 15), (16, 10, 12), (8, 6, 7), (32, 20, 30)]
)
def test_values_are_cut_out_where_high_bit_says(tmp_path, allocated, stored, high, signed, syntax):
    """Cells are put together bit by bit, the bits that belong to no value at random (old overlays lie there)."""
    rng = np.random.default_rng(high)
    low = -(1 << (stored - 1)) if signed else 0
    values = np.linspace(low, low + (1 << stored) - 1, 80).round().astype(np.int64)
    mask = ((1 << stored) - 1) << (high + 1 - stored)
    noise = rng.integers(0, 1 << 32, 80) & ((1 << allocated) - 1) & ~mask
    cells = ((values << (high + 1 - stored)) & mask | noise).astype(f"u{allocated // 8}")
    cells = cells.view(f"i{allocated // 8}") if signed else cells
    tags = {"BitsStored": stored, "HighBit": high}
    path = write(tmp_path / "a", cells.reshape(8, 10), syntax=syntax, **tags)
    np.testing.assert_allclose(gray(path).ravel(), (values - low) / ((1 << stored) - 1) * 255, atol=0.5 + 1e-6)
    assert warned(path) == ""


@pytest.mark.parametrize("stored", range(1, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_stored_values_against_python_integers(stored, signed):
    rng = np.random.default_rng(stored)
    cells = rng.integers(0, 1 << 16, 50).astype(np.uint16)
    for high in range(stored - 1, 16):
        form = PixelFormat(allocated=16, stored=stored, high=high, signed=signed)
        found = stored_values(cells.view(np.int16) if signed else cells, form)
        plain = [(int(cell) >> (high + 1 - stored)) % (1 << stored) for cell in cells]
        expected = [v - (1 << stored) if signed and v >> (stored - 1) else v for v in plain]
        assert found.tolist() == expected


@pytest.mark.parametrize("high", [0, 7, 16, 40])
def test_a_high_bit_that_cannot_be_is_left_out_and_told(tmp_path, high):
    path = write(tmp_path / "a", ramp12(), BitsStored=12, HighBit=high)
    assert ends(path) == [0, 128, 255]
    assert "HighBit contradicts" in warned(path)


@pytest.mark.parametrize(
    "without",
    ["HighBit", "BitsStored", "PixelRepresentation", "SamplesPerPixel", "NumberOfFrames", "PlanarConfiguration"],
)
def test_what_a_file_may_leave_out(tmp_path, without):
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    if without == "PlanarConfiguration":
        assert (np.asarray(load_image(write(tmp_path / "a", colour, "RGB", without=[without]))) == colour).all()
    else:
        values = ramp12()[None] if without == "NumberOfFrames" else ramp12()
        assert ends(write(tmp_path / "a", values, without=[without])) == [0, 128, 255]


@pytest.mark.parametrize("high", [11, 15])
@pytest.mark.parametrize("name", ["RLELossless", "JPEG2000Lossless"])
def test_high_bit_of_compressed_pixels(tmp_path, high, name):
    """RLE keeps the cells as they are; JPEG 2000 of 16 bits may hold the values or the cells."""
    syntax = getattr(pydicom.uid, name)
    cells = ramp12() << (high - 11)
    path = write(tmp_path / "a", cells, BitsStored=12, HighBit=high)
    data = pydicom.dcmread(path)
    if name == "RLELossless":
        data.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    else:
        stream = io.BytesIO()
        Image.fromarray(cells).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
        data.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path)
    assert ends(path) == [0, 128, 255]
    assert gray(path)[0, :32].tolist() == np.rint(np.arange(32) / 4095 * 255).tolist()


def test_pixels_of_one_bit(tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (8, 16), np.uint8)
    path = write(tmp_path / "a", np.packbits(mask, bitorder="little").reshape(1, 16), BitsAllocated=1, BitsStored=1)
    data = pydicom.dcmread(path)
    data.Rows, data.Columns = 8, 16
    data.HighBit = 0
    data.save_as(path)
    assert (gray(path) == mask * 255).all()


def test_pixels_of_32_bits(tmp_path):
    values = np.linspace(0, 2**32 - 1, 80).astype(np.uint32).reshape(8, 10)
    np.testing.assert_allclose(gray(write(tmp_path / "a", values)), values / (2**32 - 1) * 255, atol=0.5 + 1e-6)


@every_syntax
@pytest.mark.parametrize(
    ("dtype", "padding", "limit", "hidden"),
    [
        (np.int16, -2000, None, [-2000]),
        (np.int16, 63536, None, [-2000]),  # the same bits, written without a sign
        (np.int16, -2000, -1990, [-2000, -1995, -1990]),
        (np.int16, -1990, -2000, [-2000, -1995, -1990]),
        (np.uint16, 65535, None, [65535]),
        (np.uint16, -1, None, [65535]),
        (np.uint16, 65000, 65535, [65000, 65100]),
    ],
)
def test_padding_takes_no_part_in_the_range(tmp_path, dtype, padding, limit, hidden, syntax):
    values = ramp(dtype, 0, 1)
    values.ravel()[: len(hidden)] = hidden
    rest = values.ravel()[len(hidden) :].astype(float)
    raw = {"PixelPaddingValue": padding} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    order = "little" if syntax.is_little_endian else "big"
    path = write(
        tmp_path / "a",
        values,
        syntax=syntax,
        raw={name: (value & 0xFFFF).to_bytes(2, order) for name, value in raw.items()},
    )
    shown = gray(path).ravel()[len(hidden) :]
    np.testing.assert_allclose(shown, (rest - rest.min()) / (rest.max() - rest.min()) * 255, atol=0.5 + 1e-6)


def test_padding_in_bits_that_no_value_uses(tmp_path):
    """-2000 in all 16 bits around 12-bit pixels, as older CT scanners write it."""
    cells = ramp(np.uint16, 100, 10)
    cells[:2] = 63536
    path = write(tmp_path / "a", cells, BitsStored=12, raw={"PixelPaddingValue": (63536).to_bytes(2, "little")})
    rest = cells[2:].astype(float)
    expected = (rest - rest.min()) / (rest.max() - rest.min()) * 255
    np.testing.assert_allclose(gray(path)[2:], expected, atol=0.5 + 1e-6)


def test_a_missing_transfer_syntax_is_the_one_that_the_header_was_read_by(tmp_path):
    path = write(tmp_path / "a", ramp12())
    data = pydicom.dcmread(path)
    del data.file_meta.TransferSyntaxUID
    with path.open("wb") as file:
        pydicom.dcmwrite(file, data, enforce_file_format=False, implicit_vr=False, little_endian=True)
    assert "TransferSyntaxUID" not in pydicom.dcmread(path).file_meta
    assert ends(path) == [0, 128, 255]


# --- colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(("bits", "stored"), [(8, 8), (8, 5), (16, 16), (16, 12), (16, 10)])
def test_rgb(tmp_path, planar, bits, stored):
    values = np.random.default_rng(0).integers(0, 1 << stored, (6, 8, 3)).astype(f"u{bits // 8}")
    values[0, 0], values[5, 7] = 0, (1 << stored) - 1
    path = write(tmp_path / "a", values, "RGB", BitsStored=stored, PlanarConfiguration=planar)
    if planar:
        data = pydicom.dcmread(path)
        data.PixelData = np.ascontiguousarray(values.transpose(2, 0, 1)).tobytes()
        data.save_as(path)
    np.testing.assert_allclose(np.asarray(load_image(path)), values / ((1 << stored) - 1) * 255, atol=1)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(
    ("name", "interpretation"),
    [("JPEGBaseline8Bit", "YBR_FULL_422"), ("JPEG2000Lossless", "YBR_RCT"), ("RLELossless", "RGB")],
)
def test_compressed_colour_whatever_its_planar_configuration_was(tmp_path, name, interpretation, planar):
    values = np.zeros((16, 16, 3), np.uint8)
    values[:8, :, 0], values[8:, :, 2], values[:, :8, 1] = 200, 200, 100
    path = write(tmp_path / "a", values, "RGB")
    data = pydicom.dcmread(path)
    if name == "RLELossless":
        data.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom")
    else:
        stream = io.BytesIO()
        options = {"JPEG": {"quality": 95, "subsampling": 0}, "JPEG2000": {"irreversible": False, "no_jp2": True}}
        kind = "JPEG2000" if "2000" in name else "JPEG"
        Image.fromarray(values).save(stream, kind, **options[kind])
        data.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, name)
        data.PhotometricInterpretation = interpretation
    data.PlanarConfiguration = planar
    data.save_as(path)
    np.testing.assert_allclose(np.asarray(load_image(path)).astype(int), values, atol=2)


def test_colour_of_fewer_bits_than_it_says_is_not_black(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, 3), np.uint16)
    values[0, 0] = 4095
    path = write(tmp_path / "a", values, "RGB")
    np.testing.assert_allclose(np.asarray(load_image(path)), values / 4095 * 255, atol=1)
    assert "fewer bits" in warned(path)


def palette_file(path, indices, entries, bits, first=0, little=True, **more):
    """`entries`: (n, 3) numbers, each channel written as words, or as bytes where `bits` is 8."""
    tags = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(entries) & 0xFFFF, first & 0xFFFF, bits]
        column = np.asarray(entries)[:, channel]
        tags[f"{name}PaletteColorLookupTableData"] = column.astype("u1" if bits == 8 else "<u2").tobytes()
    return write(path, indices, "PALETTE COLOR", **tags, **more)


@pytest.mark.parametrize(("entries", "bits"), [(256, 8), (256, 16), (100, 16), (4096, 16), (4096, 8), (1000, 8)])
@pytest.mark.parametrize("first", [0, 20])
def test_palette(tmp_path, entries, bits, first):
    """By hand, because pydicom wraps around where indices into a palette of 8 bits are larger than 255."""
    colours = np.random.default_rng(0).integers(0, 1 << bits, (entries, 3))
    colours[0] = (1 << bits) - 1
    indices = np.arange(200, dtype=np.uint16).reshape(10, 20) * 21
    path = palette_file(tmp_path / "a", indices, colours, bits, first)
    expected = colours[np.clip(indices.astype(int) - first, 0, entries - 1)] >> (bits - 8)
    assert (np.asarray(load_image(path)) == expected).all()
    if bits == 16:
        assert (apply_color_lut(indices, pydicom.dcmread(path)) >> (bits - 8) == expected).all()


def test_a_palette_of_8_bit_colours_called_16_bits_is_not_black(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3))
    path = palette_file(tmp_path / "a", np.arange(256, dtype=np.uint8).reshape(16, 16), colours, 16)
    assert (np.asarray(load_image(path)).reshape(256, 3) == colours).all()


def test_a_dark_palette_of_8_bits_stays_dark(tmp_path):
    colours = np.random.default_rng(0).integers(0, 40, (256, 3))
    path = palette_file(tmp_path / "a", np.arange(256, dtype=np.uint8).reshape(16, 16), colours, 8)
    assert (np.asarray(load_image(path)).reshape(256, 3) == colours).all()
    assert warned(path) == ""


SEGMENTS = {
    "discrete and linear": [0, 3, 10, 20, 30, 1, 5, 130, 0, 1, 7],
    "indirect": [0, 2, 1, 2, 1, 4, 90, 2, 2, 0, 0],
    "falling": [0, 1, 200, 1, 7, 3],
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("bits", [8, 16])
def test_segmented_palettes_as_pydicom_expands_them(tmp_path, name, bits):
    codes = SEGMENTS[name] + ([0, 0] if name == "indirect" and bits == 8 else [])
    entries = expand_segments(codes, bits)
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(entries), 0, bits]
        tags[f"Segmented{colour}PaletteColorLookupTableData"] = np.array(codes, f"<u{bits // 8}").tobytes()
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = write(tmp_path / "a", indices, "PALETTE COLOR", **tags)
    expected = apply_color_lut(indices, pydicom.dcmread(path))
    assert (np.array(entries)[np.clip(indices, 0, len(entries) - 1)] == expected[..., 0]).all()
    assert (np.asarray(load_image(path)) == expected).all()  # 16-bit entries that fit into 8 bits


@pytest.mark.parametrize(
    "codes", [[1, 5, 3], [2, 1, 0, 0], [9, 9], [0, 1, 5, 2, 1, 6, 0], [0, 1, 5] + [1, 60_000, 5] * 3, []]
)
def test_damaged_segments_are_refused(codes):
    with pytest.raises(VolumeError, match="segments are damaged"):
        expand_segments(codes, 16)


@given(st.lists(st.integers(0, 255), max_size=40), st.sampled_from([8, 16]))
@settings(max_examples=200)
def test_any_segments_expand_or_are_refused(codes, bits):
    try:
        entries = expand_segments(codes, bits)
    except VolumeError:
        return
    assert 1 <= len(entries) <= 1 << 16


@pytest.mark.parametrize(
    ("interpretation", "shape", "message"),
    [
        ("RGB", (8, 8), "contradicts SamplesPerPixel"),
        ("MONOCHROME2", (8, 8, 3), "contradicts SamplesPerPixel"),
        ("YBR_ICT", (8, 8, 3), "no defined conversion"),  # not in JPEG 2000: its colours would be wrong
        ("YBR_PARTIAL_420", (8, 8, 3), "no defined conversion"),
        ("HSV", (8, 8, 3), "no defined conversion"),
        ("", (8, 8), "no defined conversion"),
        ("PALETTE COLOR", (8, 8), "palette is missing"),
    ],
)
def test_colour_models_that_are_refused(tmp_path, interpretation, shape, message):
    with pytest.raises(ImageError, match=message):
        load_image(write(tmp_path / "a", np.zeros(shape, np.uint8), interpretation))


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle_16bit.dcm",
        "SC_rgb_small_odd.dcm",
        "SC_rgb_small_odd_big_endian.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
    ],
)
def test_shipped_colour_files_as_pydicom_decodes_them(name):
    data = pydicom.dcmread(shipped(name))
    expected = pydicom.pixels.pixel_array(shipped(name)) >> (data.BitsStored - 8)
    assert (np.asarray(load_image(shipped(name))) == expected).all()


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_expb.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_padded.dcm",
    ],
)
def test_every_encoding_of_one_picture_shows_it(name):
    assert (gray(shipped(name)) == gray(shipped("MR_small.dcm"))).all()


@pytest.mark.parametrize("name", ["rtdose_1frame.dcm", "liver_1frame.dcm"])
def test_shipped_files_by_their_range(name):
    values = pydicom.pixels.pixel_array(shipped(name)).astype(float)
    data = pydicom.dcmread(shipped(name))
    values = values * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    values = values[..., : data.Columns]
    seen = values if "PixelPaddingValue" not in data else values[values != data.PixelPaddingValue]
    expected = np.clip((values - seen.min()) / (seen.max() - seen.min()), 0, 1) * 255
    np.testing.assert_allclose(gray(Path(shipped(name))), expected, atol=0.5 + 1e-6)
