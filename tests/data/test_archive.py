"""Archives: what is read is what another program packed, and what must not be unpacked is refused."""

import io
import stat
import struct
import subprocess
import sys
import zipfile

import pytest

from vitos.data import archive as module
from vitos.data.archive import Archive
from vitos.data.images import DataError


def pack(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "images.zip"


def test_files_are_read_by_name(path):
    pack(path, {"a/": b"", "a/b.txt": b"one" * 100, "c.txt": b""})
    with Archive(path) as archive:
        assert archive.names == ("a/b.txt", "c.txt")
        assert "a/b.txt" in archive
        assert "a/" not in archive
        assert archive.read("a/b.txt") == b"one" * 100
        assert archive.read("c.txt") == b""
        with pytest.raises(KeyError):
            archive.read("../c.txt")


def test_what_another_program_packed(path, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"x" * 1000)
    subprocess.run([sys.executable, "-m", "zipfile", "-c", path, tmp_path / "x.txt"], check=True)
    with Archive(path) as archive:
        assert archive.read("x.txt") == b"x" * 1000


def test_the_key_follows_the_content(path, tmp_path):
    keys = []
    for number, content in enumerate((b"one", b"one", b"two")):
        with Archive(pack(tmp_path / f"{number}.zip", {"a": content})) as archive:
            keys.append(archive.key("a"))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "C:/a", "..\\a", "\\\\host\\share\\a"])
def test_a_name_that_leaves_the_folder(path, name):
    pack(path, {"good": b"x", "placeholder": b"y"})
    # Other programs write such names; Python's own zipfile changes some of them.
    info = zipfile.ZipInfo("good")
    info.filename = name
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(info, b"x")
    with pytest.raises(DataError, match=r"images\.zip: holds .* would leave the folder"):
        Archive(path)


def test_a_symbolic_link(path):
    info = zipfile.ZipInfo("a.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"holds the symbolic link 'a\.png'"):
        Archive(path)


def test_an_encrypted_file(path):
    pack(path, {"a": b"x"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"PK\x01\x02") + 8, 1)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="'a' is encrypted"):
        Archive(path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06"])
def test_no_archive(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"images\.zip: not a readable zip archive"):
        Archive(path)


def test_a_damaged_file_is_named_and_the_others_are_read(path):
    pack(path, {"a": b"0123456789" * 10, "b": b"fine"}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0123456789", b"0123456788", 1))
    with Archive(path) as archive:
        with pytest.raises(DataError, match=r"images\.zip/a: is damaged"):
            archive.read("a")
        assert archive.read("b") == b"fine"


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(path):
    pack(path, {"bomb": b"\0" * 100_001, "fine": b"\0" * 100_000})
    with Archive(path, max_file_bytes=100_000) as archive:
        with pytest.raises(DataError, match=r"images\.zip/bomb: unpacks to 100001 bytes, more than 100000"):
            archive.read("bomb")
        assert len(archive.read("fine")) == 100_000


def test_a_claim_of_less_than_there_is_does_not_help(path):
    """The size in the list of contents is what the limit is checked against: a file must not unpack to more."""
    pack(path, {"bomb": b"\0" * 1_000_000})
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 10)
    path.write_bytes(bytes(data))
    with Archive(path, max_file_bytes=100) as archive, pytest.raises(DataError, match="bomb: "):
        archive.read("bomb")


def test_many_names_for_the_same_bytes_have_one_budget(path, monkeypatch):
    """A bomb without nesting: every entry of the list of contents points at the same compressed bytes."""
    monkeypatch.setattr(module, "FREE_BYTES", 300_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a0", b"\0" * 100_000)
    data = packed.getvalue()
    start = data.index(b"PK\x01\x02")
    entry, end = data[start : data.index(b"PK\x05\x06")], bytearray(data[data.index(b"PK\x05\x06") :])
    struct.pack_into("<HHI", end, 8, 8, 8, 8 * len(entry))
    path.write_bytes(data[:start] + b"".join(entry.replace(b"a0", f"a{i}".encode()) for i in range(8)) + end)
    with Archive(path) as archive:
        assert len(archive.names) == 8
        with pytest.raises(DataError, match="more than 20 times its size; it is a zip bomb"):
            [archive.read("a0") for _ in range(8)]


def test_too_many_files(path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    with pytest.raises(DataError, match="holds 3 files, more than 2"):
        Archive(pack(path, {"a": b"", "b": b"", "c": b""}))
