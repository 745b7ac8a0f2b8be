"""DICOM frames against pydicom's own windowing, and files that must be refused without quoting their headers."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitos.data.images import ImageError, load_image, load_image_facts

pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")

from pydicom.pixels.processing import apply_modality_lut, apply_windowing  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from tests.data.dicom_files import SECRET, gray, item, ramp, shipped, table, write  # noqa: E402


def pydicom_gray(path):
    """What pydicom's windowing makes of the file, scaled to 0..255 over the range its output can have."""
    data = pydicom.dcmread(path)
    shown = apply_windowing(apply_modality_lut(data.pixel_array, data), data)
    bits, signed = data.BitsStored, data.PixelRepresentation
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    low, high = low * slope + intercept, high * slope + intercept
    return (shown - low) / (high - low) * 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_of_the_file_as_pydicom_applies_it(tmp_path, function):
    tags = {"WindowCenter": [40, 1], "WindowWidth": [400, 1], "RescaleSlope": 2, "RescaleIntercept": -1024}
    path = write(tmp_path / "a", ramp(np.uint16, 0, 13), VOILUTFunction=function, **tags)
    np.testing.assert_allclose(gray(path), pydicom_gray(path), atol=0.5 + 1e-6)
    facts = load_image_facts(path)[1]
    assert facts.rendering.to_json() == {"window": [40.0, 400.0], "window_source": "file"}
    assert len(np.unique(gray(path))) > 10


@pytest.mark.parametrize("name", ["MR_small.dcm", "examples_overlay.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_shipped_files_as_pydicom_shows_them(name):
    np.testing.assert_allclose(gray(shipped(name)), pydicom_gray(shipped(name)), atol=0.5 + 1e-6)


def test_window_of_the_selector_beats_the_files(tmp_path):
    values = ramp()
    path = write(tmp_path / "a", values, WindowCenter=0, WindowWidth=10, RescaleSlope=1, RescaleIntercept=0)
    expected = np.clip((values - 39.5) / 399 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(gray(Path(f"{path}#window=40,400")), expected, atol=0.5 + 1e-6)
    rendering = load_image_facts(Path(f"{path}#window=40,400"))[1].rendering
    assert (rendering.window, rendering.window_source) == ((40.0, 400.0), "selector")


def test_without_a_window_the_range_without_padding(tmp_path):
    values = ramp(low=0, step=1)
    values[0, :3] = -2000
    path = write(tmp_path / "a", values, PixelPaddingValue=-2000)
    shown = gray(path)
    assert shown[0, :4].tolist() == [0, 0, 0, 0]  # padding is black, and so is 3, the least value
    assert shown[-1, -1] == 255
    rendering = load_image_facts(path)[1].rendering
    assert (rendering.window, rendering.window_source) == (((3 + 79) / 2, 76.0), "range")


def test_monochrome1_is_inverted(tmp_path):
    tags = {"WindowCenter": 0, "WindowWidth": 800}
    plain = gray(write(tmp_path / "a", ramp(), **tags))
    inverted = write(tmp_path / "b", ramp(), "MONOCHROME1", **tags)
    assert (gray(inverted) == 255 - plain).all()
    assert load_image_facts(inverted)[1].rendering.inverted


def test_modality_and_voi_look_up_tables(tmp_path):
    values = np.arange(4, dtype=np.uint8).reshape(2, 2)

    path = write(tmp_path / "a", values, VOILUTSequence=table([0, 1000, 4095, 2000], 12))
    assert gray(path).tolist() == [[0, 62], [255, 125]]
    assert load_image_facts(path)[1].rendering.window_source == "file"
    tags = {"WindowCenter": 50.5, "WindowWidth": 101}
    modality = table([100, 75, 50, 0], 16)
    modality[0].ModalityLUTType = "US"
    path = write(tmp_path / "b", values, ModalityLUTSequence=modality, **tags)
    assert gray(path).tolist() == [[255, 191], [128, 0]]


def test_frames_are_numbered_from_one(tmp_path):
    values = np.stack([np.full((4, 4), 10 * n, np.uint8) for n in range(3)])
    path = write(tmp_path / "a", values, WindowCenter=128, WindowWidth=256)
    for number in (1, 2, 3):
        image, facts = load_image_facts(Path(f"{path}#frame={number}"))
        assert np.asarray(image)[0, 0, 0] == 10 * (number - 1)
        assert facts.rendering.frame == number
    with pytest.raises(ImageError, match=r"3 frames; name the one .*#frame=1"):
        load_image(path)
    with pytest.raises(ImageError, match=r"frame=4 is not there; its frames are 1 to 3"):
        load_image(Path(f"{path}#frame=4"))


def test_functional_groups_of_a_frame(tmp_path):
    """Enhanced objects: rescale shared by all frames, a window for each."""

    rescale = Sequence([item(RescaleSlope=1, RescaleIntercept=-100, RescaleType="HU")])
    own = [
        item(FrameVOILUTSequence=Sequence([item(WindowCenter=c, WindowWidth=2, VOILUTFunction="LINEAR_EXACT")]))
        for c in (-100, -98)
    ]
    path = write(
        tmp_path / "a",
        np.array([[[0, 1, 2, 3]] * 2] * 2, np.uint8),
        SharedFunctionalGroupsSequence=Sequence([item(PixelValueTransformationSequence=rescale)]),
        PerFrameFunctionalGroupsSequence=Sequence(own),
    )
    assert gray(Path(f"{path}#frame=1"))[0].tolist() == [128, 255, 255, 255]
    assert gray(Path(f"{path}#frame=2"))[0].tolist() == [0, 0, 128, 255]


def test_colour(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path = write(tmp_path / "a", values, "RGB")
    assert (np.asarray(load_image(path)) == values).all()
    with pytest.raises(ImageError, match="no window"):
        load_image(Path(f"{path}#window=1,2"))
    deep = write(tmp_path / "b", (values.astype(np.uint16) << 8) + 7, "RGB")
    assert (np.asarray(load_image(deep)) == values).all()
    palette = pydicom.dcmread(shipped("examples_palette.dcm"))
    expected = pydicom.pixels.apply_color_lut(palette.pixel_array, palette)
    shown = np.asarray(load_image(shipped("examples_palette.dcm")))
    assert (shown == (expected >> (8 * (expected.itemsize - 1)))).all()


@pytest.mark.parametrize(
    ("tags", "warned"),
    [
        ({"BurnedInAnnotation": "YES"}, "says that text"),
        ({"BurnedInAnnotation": "NO", "Modality": "US"}, None),
        ({"Modality": "US"}, "may be burned"),
        ({}, None),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "may be burned"),
    ],
)
def test_burned_in_text_is_warned_of(tmp_path, tags, warned):
    found = load_image_facts(write(tmp_path / "a", ramp(), **tags))[1].warnings
    assert found == () if warned is None else warned in found[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MR_truncated.dcm", "pixel data are broken or truncated"),
        ("JPEG-lossy.dcm", "another decoder .*pylibjpeg"),  # 12 bit, which Pillow cannot
        ("rtplan.dcm", "without pixel data"),
        ("image_dfl.dcm", "deflated"),
        ("badVR.dcm", "header is broken"),
        ("no_meta.dcm", "no DICM mark"),
    ],
)
def test_shipped_files_that_cannot_be_shown(name, message):
    with pytest.raises(ImageError, match=rf"{name}: .*{message}"):
        load_image(shipped(name))


def test_a_missing_decoder_is_named(monkeypatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    with pytest.raises(ImageError, match=r"JPEG-LS.*no decoder.*pip install .*pyjpegls"):
        load_image(shipped("MR_small_jpeg_ls_lossless.dcm"))


def test_bad_files(tmp_path):
    path = tmp_path / "a.dcm"
    Image.new("L", (4, 4)).save(path, "PNG")
    with pytest.raises(ImageError, match="named as DICOM, but holds no DICOM file"):
        load_image(path)
    whole = write(tmp_path / "b.dcm", ramp()).read_bytes()
    for end in (131, 140, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ImageError, match=r"a\.dcm"):
            load_image(path)
    for wrong in ("axis=0&slice=0", "frame=1&axis=0&slice=0"):
        with pytest.raises(ImageError, match="DICOM knows no axis or slice"):
            load_image(Path(f"{tmp_path / 'b.dcm'}#{wrong}"))


def test_sizes_are_refused_before_pixels_are_read(tmp_path):
    path = write(tmp_path / "a", ramp(), Rows=60_000, Columns=60_000)
    with pytest.raises(ImageError, match="60000 x 60000 is more than"):
        load_image(path)
    with pytest.raises(ImageError, match="carries no evidence"):
        load_image(write(tmp_path / "b", ramp(shape=(1, 80))))


def test_no_value_of_a_header_is_told(tmp_path, caplog, recwarn):
    """Headers with a name in every text field and invalid values, whole and cut off anywhere."""
    path = tmp_path / "a.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path, ramp(), StudyInstanceUID=SECRET, PatientID=SECRET, AccessionNumber=SECRET * 9, Modality=SECRET)
        data = path.read_bytes()
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    texts = []
    for end in (*range(132, len(data), 29), len(data)):
        path.write_bytes(data[:end])
        try:
            texts.append(str(load_image_facts(path)))
        except ImageError as error:
            texts += [str(error), repr(error.__cause__)]  # a traceback shows the cause as well
    heard = [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn]
    assert not any("Jane" in text for text in texts + heard)
    assert sum("broken or truncated" in text for text in texts) > 3
    assert "MONOCHROME2" in texts[-1]
