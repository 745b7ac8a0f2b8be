"""Checkpoints that are put together from parts at their first use, in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vitos.data.files import set_default_modes


def source_name(source: str) -> str:
    """A folder by its whole path, so that it is known from everywhere; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def cached_folder(name: str, shipped: Path, sources: str, fill: Callable[[Path], None]) -> Path:
    """The folder of a checkpoint in the user's cache, made at the first call; other parts get another folder.

    Args:
        name: name of the model.
        shipped: folder with the parts that ship with the package.
        sources: where the other parts come from.
        fill: a function that fills an empty folder with the whole checkpoint.
    """
    parts = b"".join(file.read_bytes() for file in sorted(shipped.iterdir()) if file.is_file())
    key = hashlib.sha256(sources.encode() + parts).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitos"
    target = cache / f"{name}-{key}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        fill(staging)
        set_default_modes(staging)
        staging.chmod(cache.stat().st_mode)
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
