"""Checkpoints that are whole or absent: written beside, flushed, marked complete, renamed (field_notes P19)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")
# What torch.save says when write() fails: a plain RuntimeError.
_TORCH_WRITE_ERROR = re.compile(r"iostream error|inline_container")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or found; says which folder and what to do."""


def staging_path(target: Path) -> Path:
    """Where `staged_folder` fills `target`."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; becomes `target`, marked complete, when the block ends, and vanishes if it fails.

    The name changes only after all files have reached the disk, so a kill at any moment leaves either no `target` or
    a complete one. An existing `target` is replaced: it is removed between the two renames' worth of time in which a
    reader finds none, which is why nothing here ever rewrites the last complete checkpoint of a run.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written; it names the folder.
    """
    staging = staging_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in _files(staging)}
        (staging / MARKER).write_text("".join(f"{size} {name}\n" for name, size in sorted(sizes.items())))
        _flush(staging)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
        _sync(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITE_ERROR.search(str(error)):
            raise
        raise CheckpointError(
            f"{target} could not be written ({error}); free space or choose another output_dir. Earlier checkpoints "
            "are untouched: go on with --resume."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `staged_folder` should have written to its end; None: nothing.

    The mark lists all files with their sizes, so one that was cut off or lost later (a copy that broke off, a failing
    disk) is found; changed bytes are not. Files that came later, such as a model card, are nobody's business.
    """
    if not (folder / MARKER).is_file():
        return f"it was not written to its end (there is no {MARKER})"
    for line in (folder / MARKER).read_text().splitlines():
        size, _, name = line.partition(" ")
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != int(size):
            return f"{name} has {found} of {size} bytes"
    return None


def is_complete(folder: Path) -> bool:
    """Written to its end by `staged_folder`, and nothing lost since."""
    return damage(folder) is None


def all_checkpoints(run: Path) -> list[Path]:
    """`checkpoint-N` folders of a run, oldest first, complete or not."""
    if not run.is_dir():
        return []
    found = [(int(m[1]), path) for path in run.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete ones of them."""
    return [path for path in all_checkpoints(run) if is_complete(path)]


def prune_checkpoints(run: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what was left half-written."""
    if keep is not None:
        for path in complete_checkpoints(run)[: -max(1, keep)]:
            shutil.rmtree(path)
    for path in run.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _flush(folder: Path) -> None:
    for path in _files(folder):
        _sync(path)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
