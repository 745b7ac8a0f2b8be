"""The images of `vitos ask`: single ones, several, and slices, with boxes by the numbers that a person knows."""

from pathlib import Path

import pytest
from PIL import Image
from tests.data import dicom_files as dicom

from vitos.cli.pictures import open_asked, read_box
from vitos.core.geometry import Box
from vitos.data.images import DataError

CT = dicom.shipped("CT_small.dcm").parent / "dicomdirtests/98892001/CT5N"


def test_slices_are_named_by_their_numbers():
    asked = open_asked([CT], "every 2nd")
    assert (asked.numbers, len(asked.pictures)) == ((1, 3, 5), 3)
    assert asked.placed(read_box("5:0,0,0.5,0.5")) == Box(0, 0, 0.5, 0.5, 3)
    assert asked.named(Box(0.1, 0.2, 0.5, 0.5, 3)) == "slice 5 [0.1, 0.2, 0.5, 0.5]"
    assert asked.summary().startswith("3 of 5 slices, 2.5 mm apart (1, 3, 5); DICOM")
    with pytest.raises(DataError, match="--box names image 2, but there are 1, 3, 5"):
        asked.placed(read_box("2:0,0,1,1"))


def test_single_images_are_numbered_from_1(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    one, two = open_asked(paths[:1], None), open_asked(paths, None)
    assert one.named(Box(0, 0, 1, 1)) == "[0, 0, 1, 1]"
    assert two.named(Box(0, 0, 1, 1, 2)) == "image 2 [0, 0, 1, 1]"
    assert (one.lead, two.lead, two.numbers) == ("", "", (1, 2))
    assert len(two.whole()) == 2


def test_a_folder_without_slices_says_what_to_add():
    with pytest.raises(DataError, match="is a folder; say which of its slices: --slices '12 evenly'"):
        open_asked([CT], None)
    with pytest.raises(DataError, match="no such file or folder"):
        open_asked([Path("/nowhere")], "all")


@pytest.mark.parametrize("text", ["0,0,1", "0:0,0,1,1", "a:0,0,1,1", "1:2:0,0,1,1", "", "0,0,1,1,1"])
def test_boxes_that_are_none(text):
    with pytest.raises(ValueError):  # noqa: PT011  # whatever Python says; `vitos ask` words it
        read_box(text)
