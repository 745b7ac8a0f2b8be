"""Where a checkpoint is: an embedded model, a folder or a hub id."""

from __future__ import annotations

from pathlib import Path

from vitos.nano import DECODER_PATH, NANO, NANO_PATH, NANO_REAL


def config_folder(path: str | Path) -> str | Path:
    """Where a model's small files stand: those of an embedded model are at hand without its weights."""
    return {NANO: NANO_PATH, NANO_REAL: DECODER_PATH}.get(str(path), path)


def resolve_model_path(path: str | Path) -> str | Path:
    """`"nano"` and `"nano-real"` stand for the embedded models; anything else is a folder or a hub id.

    Raises:
        FileNotFoundError: for what can only be a folder (a hub id is `name` or `owner/name`) and is none.
        OSError: if nano-real's vision encoder is not at hand.
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
