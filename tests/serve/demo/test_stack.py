"""Which pictures are on the page, against the files' own numbers of frames and slices, and links to a view."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.serve.dicom import write_dicom

from vitos.core.geometry import Box
from vitos.data.images import load_image
from vitos.data.series import open_series
from vitos.serve.demo.link import PageView, digest
from vitos.serve.demo.session import PageImage
from vitos.serve.demo.stack import open_stack


@pytest.fixture
def volume(tmp_path):
    """A NIfTI volume of 6 x 8 x 10 voxels whose value is 100 i + 10 j + k."""
    nibabel = pytest.importorskip("nibabel", reason="the nifti extra is not installed")
    i, j, k = np.indices((6, 8, 10))
    path = tmp_path / "head.nii.gz"
    nibabel.save(nibabel.Nifti1Image((100 * i + 10 * j + k).astype(np.int16), np.eye(4)), path)
    return path


def write_series(folder, places):
    """One CT slice per place in mm, named against their order, in one series."""
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    files = []
    for number, place in enumerate(places):
        path = write_dicom(folder / f"{len(places) - number}.dcm")
        data = pydicom.dcmread(path)
        data.SeriesInstanceUID, data.SOPInstanceUID = "1.2.4", f"1.2.3.{number}"
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, place], [1, 0, 0, 0, 1, 0]
        data.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def page(stack, **options):
    return PageImage(stack=stack, size=(10, 10), window=None, shown=stack.start, **options)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_a_volume_is_cut_across_the_axis_that_is_chosen(volume, axis):
    stack = open_stack([volume], axis=axis)
    across = 2 if axis is None else axis
    count = (6, 8, 10)[across]
    assert (len(stack), stack.numbers, stack.word, stack.axis) == (count, tuple(range(1, count + 1)), "Slice", across)
    assert stack.start == count // 2
    assert [str(path) for path in stack.paths] == [f"{volume}#axis={across}&slice={i}" for i in range(count)]
    assert all(load_image(path).size for path in stack.paths)
    assert not stack.together


def test_an_example_that_names_a_slice_begins_with_it_and_keeps_its_window(volume):
    stack = open_stack([volume.with_name(volume.name + "#axis=1&slice=3&window=40,400")])
    assert (stack.start, stack.axis, len(stack)) == (3, 1, 8)
    assert all(str(path).endswith("&window=40,400") for path in stack.paths)
    assert open_stack([volume.with_name(volume.name + "#axis=1&slice=7")], axis=0).start == 3


def test_slices_are_asked_about_one_at_a_time_or_by_a_rule(volume):
    stack = open_stack([volume])
    assert stack.choose(" ") is None
    one = page(stack).asked(None, None)
    assert (one.paths, one.numbers, one.lead) == ((stack.paths[5],), (6,), "")
    several = page(stack, rule="every 4th", series=stack.choose("every 4th"))
    asked = several.asked(None, None)
    expected = open_series([f"{volume}#axis=2"], "every 4th")
    assert (asked.paths, asked.numbers, asked.lead) == (expected.paths, (1, 5, 9), expected.lead)
    assert asked.placed([Box(0, 0, 1, 1, 9), Box(0, 0, 1, 1, 2), Box(0, 0, 0.5, 1, 5)]) == (
        Box(0, 0, 1, 1, 3), Box(0, 0, 0.5, 1, 2)
    )  # fmt: skip
    assert asked.numbered((Box(0, 0, 1, 1, 3),)) == (Box(0, 0, 1, 1, 9),)
    for rule, words in (("every nth", "chooses no slices"), ("5-40", "ends behind"), ("x", "write every 4th")):
        with pytest.raises(ValueError, match=words):
            stack.choose(rule)


def test_more_slices_than_are_asked_about_together_are_refused_before_they_are_read(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="the nifti extra is not installed")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 40), dtype=np.int16), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="40 slices; at most 32"):
        open_stack([tmp_path / "a.nii"]).choose("all")


def test_frames_of_a_film_are_chosen_one_at_a_time(tmp_path):
    film = write_dicom(tmp_path / "film.dcm", frames=5)
    stack = open_stack([film])
    assert (stack.word, stack.numbers, stack.start) == ("Frame", (1, 2, 3, 4, 5), 2)
    assert [path.name for path in stack.paths] == [f"film.dcm#frame={n}" for n in range(1, 6)]
    with pytest.raises(ValueError, match="no slices of one series"):
        stack.choose("all")
    assert open_stack([film.with_name("film.dcm#frame=4&window=1,2")]).start == 3
    assert open_stack([film.with_name("film.dcm#frame=9")]).paths == (film.with_name("film.dcm#frame=9"),)
    single = write_dicom(tmp_path / "one.dcm")
    assert open_stack([single]).paths == (single,)


def test_files_of_one_series_are_ordered_by_their_place(tmp_path):
    files = write_series(tmp_path, [30, 0, 20, 10])
    stack = open_stack(files)
    assert (stack.word, [path.name for path in stack.paths]) == ("Slice", ["3.dcm", "1.dcm", "2.dcm", "4.dcm"])
    assert stack.choose("2-3").numbers == (2, 3)


def test_other_files_are_images_that_are_asked_about_together(tmp_path):
    files = [write_dicom(tmp_path / f"{name}.dcm") for name in "ab"]
    stack = open_stack(files)
    assert (stack.together, stack.paths, stack.numbers) == (True, tuple(files), (1, 2))
    assert "does not say where it lies" in stack.note
    assert page(stack).asked(None, None).numbers == (1, 2)
    numbered = open_stack(files, "Slice 4: <image>\nSlice 8: <image>\nWhich?")
    assert numbered.numbers == (4, 8)
    with pytest.raises(ValueError, match=r"33 images; at most 32.*not one series"):
        open_stack(files[:1] * 33)


# --- links ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40)
VIEWS = st.builds(
    PageView,
    image=st.text("0123456789abcdef", min_size=1, max_size=16),
    question=TEXT, model=TEXT, plan=TEXT, slices=TEXT,
    budget=st.floats(0, 1), boxes=st.sampled_from(["", "0, 0, 1, 1", "2: 0.1, 0.2, 0.3, 0.4\n0,0,1,1"]),
    seed=st.integers(0, 10**9), picture=st.integers(0, 999), axis=st.sampled_from(["", "0", "1", "2"]),
    window=st.sampled_from(["", "40,400", "-20.5,1"]), draw=st.sampled_from(["", "boxes", "boxes,scores"]),
)  # fmt: skip


@given(VIEWS)
def test_a_view_is_read_back_from_its_link(view):
    assert PageView.from_query(view.query) == view


@given(st.dictionaries(st.sampled_from([one.name for one in dataclasses.fields(PageView)]), TEXT), TEXT)
def test_any_address_is_read_or_refused(values, rest):
    from urllib.parse import urlencode

    for query in (f"?{urlencode(values)}", f"?image=00&{rest}"):
        try:
            PageView.from_query(query)
        except ValueError as error:
            assert "link" in str(error) or "Box" in str(error)  # noqa: PT017


def test_what_a_link_may_not_hold():
    assert (
        PageView.from_query("?__theme=dark") is PageView.from_query("?question=x") is PageView.from_query("") is None
    )
    for name, value in (("budget", "nan"), ("budget", "2"), ("seed", "-1"), ("axis", "3"), ("window", "1"),
                        ("window", "inf,2"), ("picture", "x"), ("question", "x" * 20_000)):  # fmt: skip
        with pytest.raises(ValueError, match=f"The link's {name}"):
            PageView.from_query(f"?image=00&{name}={value}")
    with pytest.raises(ValueError, match="Box 1"):
        PageView.from_query("?image=00&boxes=left")


def test_the_digest_is_that_of_the_files_in_any_order(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "red")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert digest([a, b]) == digest([b, c]) != digest([a])
    assert digest([tmp_path / "a.png#frame=1"]) != digest([a]) != digest([b])
