"""DICOM series and NIfTI volumes as ordered slices: order, choice, window, and clear words for what is no stack."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data import dicom_files as dicom

from vitos.core.geometry import Box
from vitos.core.numbering import image_numbers
from vitos.data.images import ImageError, load_image
from vitos.data.readers import DataError, iter_entries, read_records
from vitos.data.series import open_series
from vitos.data.slices import chosen_slices

AXIAL = [1, 0, 0, 0, 1, 0]
# Four of pydicom's own files: 5 slices of one CT, 4 slices with a gap, 2 localizers, 7 projections around a head.
SHIPPED = dicom.shipped("CT_small.dcm").parent / "dicomdirtests"


def write_slice(folder, name, place, *, values=None, series="1.2.3.4", axes=AXIAL, position=None, **tags):
    """One slice of 4 x 6 pixels that lies `place` mm along z."""
    folder.mkdir(exist_ok=True)
    values = np.full((4, 6), int(10 * place) + 100, np.int16) if values is None else values
    dicom.write(
        folder / name,
        values,
        SeriesInstanceUID=series,
        ImagePositionPatient=list(position or (0, 0, place)),
        ImageOrientationPatient=list(axes),
        **tags,
    )


@pytest.fixture
def ct(tmp_path):
    """Five slices, 2 mm apart, whose names and times say another order."""
    for name, place in zip("dbeac", (0, 2, 4, 6, 8), strict=True):
        write_slice(tmp_path / "ct", f"{name}.dcm", place)
    return tmp_path / "ct"


def names(series):
    return [path.name.partition("#")[0] for path in series.paths]


# --- order ----------------------------------------------------------------------------------------------------------


def test_slices_are_ordered_by_place(ct):
    series = open_series([ct], "all")
    assert names(series) == ["d.dcm", "b.dcm", "e.dcm", "a.dcm", "c.dcm"]
    assert (series.numbers, series.total, series.spacing) == ((1, 2, 3, 4, 5), 5, 2.0)
    listed = open_series(sorted(ct.iterdir()), "every 2nd")
    assert names(listed) == ["d.dcm", "e.dcm", "c.dcm"]
    assert listed.numbers == (1, 3, 5)
    assert listed.lead == "Slice 1: <image>\nSlice 3: <image>\nSlice 5: <image>\n"
    assert image_numbers(listed.lead + "Which slice?") == (1, 3, 5)


@given(
    st.permutations(range(6)), st.sampled_from([(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (0.6, 0.8, 0, -0.8, 0.6, 0)])
)
def test_order_is_along_the_normal_in_any_orientation(tmp_path_factory, order, axes):
    """Against the position that was written: sagittal, coronal, and turned in the plane."""
    folder = tmp_path_factory.mktemp("turned")
    normal = np.cross(axes[:3], axes[3:])
    for number, place in enumerate(order):
        write_slice(folder, f"{number}", place, position=(5 - 3.0 * place * normal).round(4).tolist(), axes=axes)
    got = [int(name) for name in names(open_series([folder], "all"))]
    assert [order[number] for number in got] == [5, 4, 3, 2, 1, 0]


def test_the_files_that_pydicom_ships():
    five = open_series([SHIPPED / "98892001/CT5N"], "all")
    assert names(five) == ["3353", "3023", "2693", "2392", "2062"]
    assert five.spacing == 2.5
    part = open_series([SHIPPED / "77654033/CT2"], "2-4")  # on one side of a gap
    assert names(part) == ["17136", "17166", "17196"]


def test_frames_of_an_enhanced_file_are_its_slices(tmp_path):
    """Positions of frames are in the functional groups."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    path = tmp_path / "enhanced.dcm"
    dicom.write(path, np.arange(3 * 4 * 6, dtype=np.int16).reshape(3, 4, 6), SeriesInstanceUID="1.2")
    data = pydicom.dcmread(path)
    frames = []
    for place in (4, 0, 2):
        plane, frame = Dataset(), Dataset()
        plane.ImagePositionPatient = [0, 0, place]
        frame.PlanePositionSequence = Sequence([plane])
        frames.append(frame)
    turned, shared = Dataset(), Dataset()
    turned.ImageOrientationPatient = AXIAL
    shared.PlaneOrientationSequence = Sequence([turned])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.save_as(path)
    found = open_series([path], "all")
    assert [path.name.split("&")[0] for path in found.paths] == [f"enhanced.dcm#frame={n}" for n in (2, 3, 1)]


# --- choice ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_evenly_is_even(total, data):
    count = data.draw(st.integers(1, total))
    chosen = chosen_slices(f"{count} evenly", total)
    steps = np.diff([0, *chosen, total + 1])
    assert len(set(chosen)) == count
    assert 1 <= chosen[0] <= chosen[-1] <= total
    assert max(steps[1:-1], default=1) - min(steps[1:-1], default=1) <= 1
    assert abs((chosen[0] - 1) - (total - chosen[-1])) <= 1  # as much is left out in front as behind


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        ("every 4th", (1, 5, 9)),
        ("every 1", tuple(range(1, 11))),
        ("3-3", (3,)),
        ("8 - 10", (8, 9, 10)),
        ("1 evenly", (6,)),
    ],
)
def test_rules(rule, numbers):
    assert chosen_slices(rule, 10) == numbers


@pytest.mark.parametrize(
    "rule",
    ["", "every", "every 0th", "0 evenly", "11 evenly", "4-2", "0-3", "8-11", "5", "-1", "every 2nd, 3-4", "٣-٤"],
)
def test_rules_that_choose_nothing(rule):
    with pytest.raises(ValueError, match=r"chooses no slices|more slices than|behind the last"):
        chosen_slices(rule, 10)


# --- what is no stack -----------------------------------------------------------------------------------------------


def refused(folder, match, rule="all"):
    with pytest.raises(ImageError, match=match) as caught:
        open_series([folder], rule)
    assert dicom.SECRET not in str(caught.value)
    assert "1.2.3" not in str(caught.value)


def test_a_missing_slice(ct):
    (ct / "e.dcm").unlink()
    refused(ct, r"a slice is missing between b.dcm and a.dcm \(4.00 mm, elsewhere 2.00 mm\)")
    assert open_series([ct], "3-4").numbers == (3, 4)


def test_uneven_distances(ct):
    write_slice(ct, "f.dcm", 11)
    refused(ct, "not at equal distances: 3.00 mm between c.dcm and f.dcm")


def test_two_slices_at_one_place(ct):
    shutil.copyfile(ct / "e.dcm", ct / "z.dcm")
    refused(ct, "lie at one place .* several phases, echoes or copies")


def test_two_series(ct):
    write_slice(ct, "f.dcm", 10, series="1.2.3.5")
    refused(ct, r"files of 2 series \(5 with a.dcm; 1 with f.dcm\)")


def test_a_localizer(ct):
    write_slice(ct, "f.dcm", 10, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    refused(ct, "f.dcm is a localizer")


def test_mixed_orientations(ct):
    write_slice(ct, "f.dcm", 10, axes=[1, 0, 0, 0, 0, -1])
    refused(ct, "f.dcm lies in another orientation than a.dcm")


def test_different_sizes(ct):
    write_slice(ct, "f.dcm", 10, values=np.zeros((5, 6), np.int16))
    refused(ct, r"f.dcm has another size than a.dcm \(6 x 5 pixels, 6 x 4 pixels\)")


def test_a_tilted_gantry(tmp_path):
    tilt = np.radians(20)
    axes = [1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)]
    for place in range(4):
        write_slice(tmp_path / "ct", f"{place}.dcm", 3 * place, axes=axes, GantryDetectorTilt=-20)
    refused(tmp_path / "ct", "the gantry was tilted by -20 degrees: the stack leans by 20.0 degrees")
    shifted = tmp_path / "shifted"
    for place in range(4):
        write_slice(shifted, f"{place}.dcm", place, position=(place, 0, 3 * place))
    refused(shifted, "shifted sideways")


def test_a_tilt_that_was_resampled_is_an_upright_stack(tmp_path):
    for place in range(3):
        write_slice(tmp_path / "ct", f"{place}.dcm", place, GantryDetectorTilt=-20)
    assert open_series([tmp_path / "ct"], "all").total == 3


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("77654033/CT2", "161 slices are missing between 17106 and 17136"),
        ("98892001/CT2N", "6293 is a localizer"),
        ("98892003/MR1", "files of 3 series"),
        ("98892003/MR700", "4528 lies in another orientation than 4467"),
    ],
)
def test_the_folders_that_pydicom_ships(name, match):
    refused(SHIPPED / name, match)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: None, "no DICOM file"),
        (lambda f: (f / "a.dcm").write_bytes(b"no"), "a.dcm is named as DICOM, but is none"),
        (lambda f: write_slice(f, "a.dcm", 0, position=(0, 0)), "does not say where it lies"),
        (lambda f: write_slice(f, "a.dcm", 0, axes=[0] * 6), "does not say where it lies"),
        (lambda f: shutil.copyfile(dicom.shipped("rtdose.dcm"), f / "a"), "15 frames without positions"),
        (lambda f: shutil.copyfile(dicom.shipped("reportsi.dcm"), f / "a"), "holds no image"),
    ],
)
def test_folders_without_a_series(tmp_path, make, match):
    (tmp_path / "ct").mkdir()
    make(tmp_path / "ct")
    refused(tmp_path / "ct", match)


def test_other_files_of_a_folder_are_left_alone(ct):
    for name in ("README.txt", ".DS_Store", "DICOMDIR"):
        (ct / name).write_bytes(b"x" * 200)
    (ct / "inside").mkdir()
    assert open_series([ct], "all").total == 5


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nowhere", "no such file or folder")


# --- windows --------------------------------------------------------------------------------------------------------


def gray(series):
    return [int(np.asarray(load_image(path))[0, 0, 0]) for path in series.paths]


def test_without_a_window_all_slices_share_the_range_of_all(ct):
    assert gray(open_series([ct], "all")) == [0, 64, 128, 191, 255]  # 100, 120, 140, 160, 180
    assert gray(open_series([ct], "1-3")) == [0, 128, 255]


def test_a_window_behind_the_folder_holds_for_all(ct):
    series = open_series([f"{ct}#window=140,41"], "all")
    assert all(path.name.endswith("#window=140,41") for path in series.paths)
    assert gray(series) == [0, 3, 131, 255, 255]


def test_one_window_of_all_files_is_used_and_different_ones_are_joined(tmp_path):
    for place in range(3):
        write_slice(tmp_path / "same", f"{place}.dcm", place, WindowCenter=110, WindowWidth=41)
        write_slice(tmp_path / "other", f"{place}.dcm", place, WindowCenter=110 + 10 * place, WindowWidth=20)
    same, other = open_series([tmp_path / "same"], "all"), open_series([tmp_path / "other"], "all")
    assert all("window" not in path.name for path in same.paths)
    assert all(path.name.endswith("#window=120.5,41") for path in other.paths)  # from 100 to 140
    assert gray(other) == [0, 64, 128]


# --- NIfTI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path):
    """A volume of 4 x 5 x 6 voxels whose value is 100 x first + 10 x second + third index."""
    values = sum(np.indices((4, 5, 6)) * np.array([100, 10, 1]).reshape(3, 1, 1, 1)).astype(np.int16)
    path = tmp_path / "v.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 2, 3, 1])), path)
    return path


@pytest.mark.parametrize(("axis", "total", "apart"), [(0, 4, 1), (1, 5, 2), (2, 6, 3)])
def test_slices_along_each_axis(volume, axis, total, apart):
    series = open_series([f"{volume}#axis={axis}"], "all")
    assert (series.total, series.spacing) == (total, apart)
    full = nibabel.load(volume).get_fdata()
    for number, path in zip(series.numbers, series.paths, strict=True):
        expected = np.take(full, number - 1, axis).T / 345 * 255
        assert np.abs(np.asarray(load_image(path))[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize(
    ("selector", "rule", "match"),
    [
        ("", "all", "along which axis are the slices"),
        ("#axis=2&slice=1", "all", "slice cannot be chosen as well"),
        ("#axis=2&frame=1", "all", "frame cannot be chosen as well"),
        ("#axis=3", "all", "axis=3"),
        ("#axis=2", "9 evenly", "more slices than the 6"),
    ],
)
def test_volumes_that_are_not_clear(volume, selector, rule, match):
    with pytest.raises(ImageError, match=match):
        open_series([f"{volume}{selector}"], rule)


def test_a_volume_over_time_is_refused():
    path = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"
    with pytest.raises(ImageError, match=r"4 axes \(128 x 96 x 24 x 2\); save the one volume"):
        open_series([f"{path}#axis=2"], "all")


# --- records --------------------------------------------------------------------------------------------------------


def write_records(folder, **changes):
    row = {
        "image_path": "ct",
        "slices": "every 2nd",
        "question": "In which slice is the nodule?\nA. 1\nB. 3",
        "answer": "B",
        "bbox": [{"slice": 3, "box": [0.1, 0.2, 0.3, 0.4]}, {"slice": 5, "box": [0, 0, 1, 1]}],
    } | changes
    row = {name: value for name, value in row.items() if value is not None}
    (folder / "test.json").write_text(json.dumps([row]))
    return folder / "test.json"


def test_a_series_is_one_record(ct):
    (record,) = read_records(write_records(ct.parent))
    assert [path.name.partition("#")[0] for path in record.image_paths] == ["d.dcm", "e.dcm", "c.dcm"]
    assert image_numbers(record.question) == (1, 3, 5)
    assert record.options == {"A": "1", "B": "3"}
    assert record.boxes == (Box(0.1, 0.2, 0.3, 0.4, 2), Box(0, 0, 1, 1, 3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"slices": None, "bbox": None}, "is a folder; name a file, or add"),
        ({"slices": 4}, "slices: is 4, not a text"),
        ({"slices": "some"}, "chooses no slices"),
        ({"question": "<image>What?\nA. 1\nB. 3"}, "leave it out; the slices go in front"),
        ({"bbox": [[0, 0, 1, 1]]}, r'bbox\[0\]: .* write {"slice": 17'),
        ({"bbox": [{"image": 1, "box": [0, 0, 1, 1]}]}, r"bbox\[0\]"),
        ({"bbox": [{"slice": 2, "box": [0, 0, 1, 1]}]}, "slice 2 is not among the images: its rule leaves it out"),
        ({"bbox": [{"slice": 6, "box": [0, 0, 1, 1]}]}, "slice 6 is not among the images: the series has 5"),
        ({"bbox": [{"slice": True, "box": [0, 0, 1, 1]}]}, "the slice True, not a whole number"),
        ({"image_path": ["ct", "ct/a.dcm"]}, "a folder in a list of files"),
        ({"image_path": "other"}, "there is no file"),
    ],
)
def test_records_about_a_series_that_do_not_fit(ct, changes, match):
    with pytest.raises(DataError, match=match):
        read_records(write_records(ct.parent, **changes))


def test_a_file_of_a_series_that_leads_out_of_the_data_set_is_refused(ct, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.dcm"
    (ct / "e.dcm").rename(outside)
    (ct / "e.dcm").symlink_to(outside)
    with pytest.raises(DataError, match="symlink out of the data set's folder"):
        read_records(write_records(ct.parent))


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([[0, 0, 0.5, 1], {"image": 2, "box": [0, 0, 1, 1]}], (Box(0, 0, 0.5, 1), Box(0, 0, 1, 1, 2))),
        ([{"image": 3, "box": [0, 0, 1, 1]}], "lies in image 3, but there are 2"),
        ([{"image": 0, "box": [0, 0, 1, 1]}], "the image 0, not a whole number from 1"),
        ([{"image": 1.0, "box": [0, 0, 1, 1]}], "the image 1.0, not a whole number"),
        ([{"image": 2, "box": [0, 0, 1]}], "not four numbers"),
        ([{"image": 2, "bbox": [0, 0, 1, 1]}], "not four numbers"),
        ([{"image": 2, "box": [0, 0, 2, 1]}], "must lie in 0..1"),
    ],
)
def test_boxes_name_their_image(ct, bbox, expected):
    path = write_records(
        ct.parent,
        image_path=["ct/a.dcm", "ct/b.dcm"],
        slices=None,
        question="<image><image>What?\nA. 1\nB. 3",
        bbox=bbox,
    )
    (entry,) = iter_entries(path)
    if isinstance(expected, str):
        assert expected in str(entry.problems[0])
    else:
        assert entry.record.boxes == expected
