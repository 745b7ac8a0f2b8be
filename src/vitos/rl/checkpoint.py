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
        (staging / MARKER).write_text("")
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


def is_complete(folder: Path) -> bool:
    """Written to its end by `staged_folder`."""
    return (folder / MARKER).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete `checkpoint-N` folders of a run, oldest first; half-written ones are ignored."""
    if not run.is_dir():
        return []
    found = [(int(m[1]), p) for p in run.iterdir() if (m := _NAME.fullmatch(p.name)) and is_complete(p)]
    return [path for _, path in sorted(found)]


def prune_checkpoints(run: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what was left half-written."""
    if keep is not None:
        for path in complete_checkpoints(run)[: -max(1, keep)]:
            shutil.rmtree(path)
    for path in run.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        _sync(path)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
