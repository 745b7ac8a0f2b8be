"""Atomic writes: what a reader sees after success, an exception and Ctrl-C."""

import json
import os
import stat

import pytest

from vitos.data.files import atomic_folder, atomic_write, write_json_atomic, write_text_atomic


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_target_is_untouched_until_the_block_ends(tmp_path):
    path = tmp_path / "curve.png"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["curve.png"]


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text_atomic(tmp_path / "atomic", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1  # a file of mkstemp would be 0600


def test_text_keeps_line_ends(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "µ\n\r\nb")
    assert (tmp_path / "a.txt").read_bytes() == "µ\n\r\nb".encode()


def test_json_layout(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"b": 1, "a": ["µ"]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "µ"\n  ]\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_say(tmp_path, value):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"loss": 1})
    with pytest.raises(ValueError, match=r"a\.json was not written"):
        write_json_atomic(path, {"loss": value})
    assert json.loads(path.read_text()) == {"loss": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_vanishes(tmp_path, error):
    def fail():
        with atomic_folder(tmp_path / "set") as partial:
            (partial / "images").mkdir()
            raise error

    with pytest.raises(error):
        fail()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("before", [False, True])
def test_folder_appears_whole(tmp_path, before):
    target = tmp_path / "new" / "set"
    if before:
        target.mkdir(parents=True)  # empty: allowed
    with atomic_folder(target) as partial:
        assert partial == tmp_path / "new" / "set.partial"
        (partial / "a").write_text("1")
        assert not (target / "a").exists()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["new", "new/set", "new/set/a"]


def test_folder_refuses_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"), atomic_folder(tmp_path / "full"):
        pytest.fail("must not be entered")
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "b").write_text("of another run")
    with pytest.raises(FileExistsError, match="another run"), atomic_folder(tmp_path / "set"):
        pytest.fail("must not be entered")
    assert (tmp_path / "full" / "a").exists()
    assert (tmp_path / "set.partial" / "b").exists()
