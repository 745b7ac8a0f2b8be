"""Names of pictures inside files: what is split off, what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import Box
from vitos.data.picture import PictureSelector, parse_selector, split_name, without_crop


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("a/scan.dcm#frame=3", "a/scan.dcm", "frame=3"),
        ("ct.nii.gz#axis=2&slice=40&window=40,400", "ct.nii.gz", "axis=2&slice=40&window=40,400"),
        ("case #2.png", "case #2.png", ""),
        ("a#1/b.png", "a#1/b.png", ""),
        ("a#b=1/c.png", "a#b=1/c.png", ""),  # a folder's name is no selector
        ("a#1.png#window=0,1", "a#1.png", "window=0,1"),
        ("scan.dcm", "scan.dcm", ""),
    ],
)
def test_only_pairs_behind_the_last_mark_are_a_selector(name, file, text):
    assert split_name(name) == (Path(file), text)


def test_every_key_is_read():
    assert parse_selector("") == PictureSelector()
    assert parse_selector("frame=3") == PictureSelector(frame=3)
    read = parse_selector("window=-600.5,1500&slice=0&axis=1")
    assert read == PictureSelector(axis=1, slice=0, window=(-600.5, 1500.0))
    assert parse_selector("crop=0,0.25,.5,1") == PictureSelector(crop=Box(0, 0.25, 0.5, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frames=3", "'frames' selects nothing"),
        ("frame=0", "frame=0 is no whole number from 1"),
        ("frame=-1", "no whole number"),
        ("frame=1.5", "no whole number"),
        ("frame=", "no whole number"),
        ("frame=1&frame=2", "given twice"),
        ("axis=3&slice=1", "axis=3 is no whole number 0 to 2"),
        ("axis=1", "belong together"),
        ("slice=1", "belong together"),
        ("window=40", "no centre and width"),
        ("window=40,0.5", "width >= 1"),
        ("window=nan,400", "no centre and width"),
        ("window=40,inf", "no centre and width"),
        ("window=1,2,3", "no centre and width"),
        ("frame=1&", "'' selects nothing"),
        ("crop=0,0,1", "no part of the picture"),
        ("crop=0.5,0,0.5,1", "no part of the picture"),
        ("crop=0,0,1,1.1", "no part of the picture"),
        ("crop=0,nan,1,1", "no part of the picture"),
    ],
)
def test_refusals_say_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        parse_selector(text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        selector = parse_selector(text)
    except ValueError:
        return
    assert selector.frame is None or selector.frame >= 1
    assert selector.window is None or selector.window[1] >= 1


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("a/scan.dcm#crop=0,0,1,0.5", "a/scan.dcm"),
        ("scan.dcm#frame=3&crop=0,0,1,0.5&window=40,400", "scan.dcm#frame=3&window=40,400"),
        ("scan.dcm#frame=3", "scan.dcm#frame=3"),
        ("case #2.png", "case #2.png"),
    ],
)
def test_the_whole_picture_of_a_part(name, whole):
    assert without_crop(name) == Path(whole)
