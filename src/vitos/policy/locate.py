"""Where a checkpoint is: an embedded model, a folder or a hub id."""

from __future__ import annotations

from pathlib import Path

from vitos.nano import DECODER_PATH, NANO, NANO_PATH, NANO_REAL


def config_folder(path: str | Path) -> str | Path:
    """The folder or hub id of a model's configuration; for an embedded model, without loading its weights."""
    return {NANO: NANO_PATH, NANO_REAL: DECODER_PATH}.get(str(path), path)


def resolve_model_path(path: str | Path) -> str | Path:
    """The folder or hub id of a checkpoint, where `"nano"` and `"nano-real"` name the embedded models.

    Raises:
        FileNotFoundError: if the path can only be a folder (a hub id is `name` or `owner/name`) and does not exist.
        OSError: if the vision encoder of nano-real cannot be loaded.
    """
    text = str(path)
    if text == NANO:
        return NANO_PATH
    if text == NANO_REAL:
        from vitos.nano.real import nano_real_path  # loads transformers

        return nano_real_path()
    if (text.count("/") > 1 or text.startswith((".", "/", "~"))) and not Path(text).is_dir():
        raise FileNotFoundError(
            f"{text}: there is no such folder; name a checkpoint's folder, a hub id, {NANO} or {NANO_REAL}"
        )
    return path
