"""Names in one spelling for files in the other, and text that no file can hold."""

import os
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitos.data.archive import Archive
from vitos.data.images import DataError, load_image, resolve_under
from vitos.data.names import as_spelled_on_disk, half_character, same_name

NAMES = ["é.png", "Röntgen/Übersicht ö.png", "á/è/ñ.png", "각막.png", "ấ.png", "Å/plain.png"]


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_found_in_either_spelling(tmp_path, name, stored, asked):
    path = tmp_path / normalize(stored, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)
    assert resolve_under(tmp_path, normalize(asked, name)) == path.resolve()
    assert load_image(normalize(asked, name) + "#crop=0,0,1,1", root=tmp_path).size == (4, 4)


def test_a_name_of_both_spellings_at_once(tmp_path):
    """One letter composed, the other not, as tools leave it that join names of two sources."""
    mixed = normalize("NFC", "é") + normalize("NFD", "ö") + ".png"
    Image.new("L", (4, 4)).save(tmp_path / normalize("NFC", mixed))
    assert load_image(mixed, root=tmp_path).size == (4, 4)
    assert resolve_under(tmp_path, normalize("NFD", mixed)).is_file()


def test_the_spelling_that_is_written_comes_first(tmp_path):
    names = [normalize(form, "é.png") for form in ("NFC", "NFD")]
    for size, name in enumerate(names, start=4):
        Image.new("L", (size, size)).save(tmp_path / name)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes both spellings for one name")
    assert [load_image(name, root=tmp_path).width for name in names] == [4, 5]


def test_a_file_that_comes_later_is_found(tmp_path):
    assert not resolve_under(tmp_path, normalize("NFC", "é.png")).is_file()
    Image.new("L", (4, 4)).save(tmp_path / normalize("NFD", "é.png"))
    assert resolve_under(tmp_path, normalize("NFC", "é.png")).is_file()


def test_another_spelling_leads_out_of_the_folder_no_more_than_the_name_itself(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (root / normalize("NFD", "é.png")).symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="symlink out of"):
        resolve_under(root, normalize("NFC", "é.png"))


@given(st.text(alphabet="aé̈öu각\u0301/ .", min_size=1, max_size=8))
def test_names_without_files_stay_as_they_are(name):
    assert as_spelled_on_disk(Path("/nowhere"), Path(name)) == Path("/nowhere") / name


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_archives(tmp_path, stored, asked):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(normalize(stored, "Bilder/ö.png"), b"content")
    with Archive(tmp_path / "a.zip") as archive:
        name = normalize(asked, "Bilder/ö.png")
        assert name in archive
        assert archive.read(name) == b"content"
        assert archive.key(name) == archive.key(archive.names[0])
        assert "Bilder/o.png" not in archive
        with pytest.raises(KeyError):
            archive.read("Bilder/ä.png")


def test_same_name():
    assert same_name(normalize("NFC", "é"), normalize("NFD", "é"))
    assert not same_name("e", "é")


@pytest.mark.parametrize(("text", "half"), [("a\ud83d", "\\ud83d"), ("\udc00b", "\\udc00"), ("😀", None), ("", None)])
def test_half_characters(text, half):
    assert half_character(text) == half


@given(st.text())
def test_a_text_without_half_characters_can_be_written(text):
    assert half_character(text) is None
    text.encode()


def test_a_name_with_half_a_character_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"half a character|URL|there is no"):
        resolve_under(tmp_path, "a\ud83d.png")
    assert os.listdir(tmp_path) == []
