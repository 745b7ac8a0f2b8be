"""Results appear whole or not at all: files and folders are written under another name first, then renamed.

Trade-offs, chosen once for the whole package:

- The temporary file lies in the folder of the target, because a rename is atomic only within one file system. So the
  folder must be writable, and a killed process (SIGKILL, power) can leave one `.name.xxxxxxxx.tmp` behind; the target
  itself is then still the old one.
- A file and its folder entry are flushed to the disk before `atomic_write` returns: slow for thousands of small
  files, right for checkpoints' markers, reports and data lists. `atomic_folder` does not flush what is in it.
- The target is replaced, not written into: its permissions are those of a new file, a symlink at its place becomes a
  file, and of two writers at once the last one wins.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same suffix and folder; on leaving, flush it and put it in the place of `path`.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist, or the block wrote no file.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(_default_mode())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: Path, value: object) -> None:
    """Write `value` as JSON: keys in their order, indented by 2, with a newline at the end.

    Raises:
        ValueError: if `value` holds NaN or infinity, which JSON cannot say and other programs refuse.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} was not written: {error}; write None where a number is not known") from error
    write_text_atomic(path, text + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield the new folder `<target>.partial`; on leaving, rename it to `target`.

    On any exception, Ctrl-C included, the partial folder is removed and `target` stays as it was.

    Raises:
        FileExistsError: if `target` is a file or a folder that is not empty, or if `<target>.partial` exists.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and is not an empty folder; name another one or remove it")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise FileExistsError(f"{partial} exists: another run writes it, or one was killed; then remove it") from error
    try:
        yield partial
        if target.exists():
            target.rmdir()  # empty, as checked; a folder filled in the meantime fails here and is not lost
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    _flush_folder(target.parent)


def set_default_modes(folder: Path) -> None:
    """Give the files of a folder the permissions of a new file under the umask.

    safetensors writes its files for their owner alone, whatever the umask says.
    """
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(_default_mode())


def _default_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _flush_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut; only POSIX can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
