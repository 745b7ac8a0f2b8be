"""NIfTI slices against nibabel's whole array."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from vitos.data.images import ImageError, load_image_facts

nibabel = pytest.importorskip("nibabel", reason="the nifti extra is not installed")


@pytest.fixture(params=["ct.nii", "ct.nii.gz"])
def volume(tmp_path, request):
    values = np.random.default_rng(0).integers(-1000, 1500, (5, 6, 7)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([-1.0, 1.0, 1.0, 1.0]))
    image.header.set_slope_inter(1, -24)  # values as seen: stored - 24
    nibabel.save(image, tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_lies_as_stored(volume, axis):
    whole = nibabel.load(volume).get_fdata()
    image, facts = load_image_facts(Path(f"{volume}#axis={axis}&slice=3&window=40,400"))
    width, height = (n for other, n in enumerate(whole.shape) if other != axis)
    assert image.size == (width, height)
    expected = np.clip((np.take(whole, 3, axis) - 39.5) / 399 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(np.asarray(image)[..., 0].T, expected, atol=0.5 + 1e-6)
    assert facts.rendering.to_json() == {
        "axis": axis,
        "slice": 3,
        "window": [40.0, 400.0],
        "window_source": "selector",
    }


def test_without_a_window_the_slices_range(volume):
    image, facts = load_image_facts(Path(f"{volume}#axis=2&slice=0"))
    plane = nibabel.load(volume).get_fdata()[:, :, 0]
    low, high = plane.min(), plane.max()
    np.testing.assert_allclose(np.asarray(image)[..., 0].T, (plane - low) / (high - low) * 255, atol=0.51)
    assert (facts.format, facts.rendering.window) == ("NIFTI", ((low + high) / 2, high - low))


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("", "a volume of 5 x 6 x 7; name a slice"),
        ("#window=1,2", "name a slice"),
        ("#axis=0&slice=5", "slice=5 is not there; along axis 0 they are 0 to 4"),
        ("#frame=1", "NIFTI knows no frame"),
        ("#axis=4&slice=5", "axis=4"),
    ],
)
def test_selectors_that_do_not_fit(volume, selector, message):
    with pytest.raises(ImageError, match=message):
        load_image_facts(Path(f"{volume}{selector}"))


def test_broken_volumes(tmp_path, volume):
    data = volume.read_bytes()
    name = tmp_path / f"broken{''.join(volume.suffixes)}"
    for part in (b"", data[:100], data[: len(data) * 2 // 3], b"x" * 1000):
        name.write_bytes(part)
        with pytest.raises(ImageError, match="broken, truncated or no NIfTI"):
            load_image_facts(Path(f"{name}#axis=2&slice=6"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4, 4, 3), np.float32), "4 axes"),
        (np.zeros((4, 4, 4), np.complex64), "not gray"),
        (np.full((4, 4, 4), np.nan, np.float32), "no finite value"),
        (np.zeros((1, 4, 4), np.float32), "carries no evidence"),
    ],
)
def test_volumes_that_are_no_gray_picture(tmp_path, values, message):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ImageError, match=message):
        load_image_facts(Path(f"{tmp_path / 'a.nii'}#axis=1&slice=0"))


def test_pixel_limits_hold_before_values_are_read(tmp_path):
    path = tmp_path / "a.nii"
    header = nibabel.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 2))
    path.write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(ImageError, match="30000 x 30000 is more than"):
        load_image_facts(Path(f"{path}#axis=2&slice=0"))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8"])
def test_nothing_outside_of_the_brain_is_black(tmp_path, kind, suffix):
    """NaN around it and infinities in it: the range is that of the finite values of the slice."""
    values = np.random.default_rng(0).uniform(5, 90, (6, 7, 3))
    values[0], values[:, 0] = np.nan, np.nan
    values[2, 2], values[3, 3] = np.inf, -np.inf
    nibabel.save(nibabel.Nifti1Image(values.astype(kind), np.eye(4)), tmp_path / f"a{suffix}")
    name = f"{tmp_path / f'a{suffix}'}#axis=2&slice=1"
    plane = values[:, :, 1].astype(kind)
    seen = plane[np.isfinite(plane)]
    low, high = float(seen.min()), float(seen.max())
    image, facts = load_image_facts(Path(name))
    shown = np.asarray(image)[..., 0].T
    expected = np.nan_to_num((plane - low) / (high - low), nan=0, posinf=1, neginf=0) * 255
    np.testing.assert_allclose(shown, expected, atol=0.5 + 1e-4)
    assert facts.rendering.window == pytest.approx(((low + high) / 2, high - low))
    windowed = np.asarray(load_image_facts(Path(f"{name}&window=50,41"))[0])[..., 0].T
    expected = np.clip(np.nan_to_num((plane - 49.5) / 40 + 0.5, nan=0, posinf=1, neginf=0), 0, 1) * 255
    np.testing.assert_allclose(windowed, expected, atol=0.5 + 1e-4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("slope", [0, 2, np.nan])
def test_a_slope_of_zero_or_nan_is_none(tmp_path, order, slope):
    """As the format's standard says; nibabel does so as well."""
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(values, np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([slope, 7 if slope == 2 else 0], "<f4").tobytes()  # scl_slope and scl_inter
    if order == ">":
        header = nibabel.Nifti1Header.from_fileobj(io.BytesIO(bytes(content[:348]))).as_byteswapped(">")
        content = header.binaryblock + content[348:352] + values.astype(">i2").tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    picture, facts = load_image_facts(Path(f"{tmp_path / 'a.nii'}#axis=0&slice=1"))
    plane = values[1] * (2.0 if slope == 2 else 1) + (7 if slope == 2 else 0)
    assert facts.rendering.window == ((plane.min() + plane.max()) / 2, plane.max() - plane.min())
    expected = (plane - plane.min()) / (plane.max() - plane.min()) * 255
    np.testing.assert_allclose(np.asarray(picture)[..., 0].T, expected, atol=0.51)


def test_one_slice_without_a_third_axis(tmp_path):
    values = np.arange(30, dtype=np.float32).reshape(5, 6)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    picture, _ = load_image_facts(Path(f"{tmp_path / 'a.nii'}#axis=2&slice=0"))
    np.testing.assert_allclose(np.asarray(picture)[..., 0].T, values / 29 * 255, atol=0.51)
    with pytest.raises(ImageError, match="slice=1 is not there"):
        load_image_facts(Path(f"{tmp_path / 'a.nii'}#axis=2&slice=1"))


@pytest.mark.filterwarnings("error")
def test_the_widest_range_there_is(tmp_path):
    values = np.zeros((4, 4, 2))
    values[0, 0], values[1, 1] = np.finfo(np.float64).min, np.finfo(np.float64).max
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    picture, facts = load_image_facts(Path(f"{tmp_path / 'a.nii'}#axis=2&slice=0"))
    assert np.asarray(picture)[..., 0][:2, :2].tolist() == [[0, 128], [128, 255]]
    json.dumps(facts.to_json(), allow_nan=False)
