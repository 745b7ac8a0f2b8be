"""Where a checkpoint is: an embedded model, a folder or a hub id; and a quick word where it is none of them."""

from __future__ import annotations

import difflib
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vitos.nano import COMPLETE, DECODER_PATH, EMBEDDED, NANO_REAL, SMALL, SMALL_PATH

CONFIG = "config.json"
HUB_SECONDS = 5.0


def config_folder(path: str | Path) -> str | Path:
    """Where the small files of a model are: those of an embedded model are at hand without its weights."""
    return {**COMPLETE, NANO_REAL: DECODER_PATH, SMALL: SMALL_PATH}.get(str(path), path)


def resolve_model_path(path: str | Path) -> str | Path:
    """The folder or hub id of a model; `"nano"`, `"nano-volumes"`, `"nano-real"` and `"small"` are the embedded ones.

    The folder of a training run (`runs/quickstart`) is its final model.

    Raises:
        FileNotFoundError: for a folder without a model, and for a name that is no folder and is not on the hub; it is
            asked once, for a few seconds.
        OSError: if a part of nano-real or small that does not ship is not at hand.
    """
    text = str(path)
    if text in COMPLETE:
        return COMPLETE[text]
    if text == NANO_REAL:
        from vitos.nano.real import nano_real_path  # loads transformers

        return nano_real_path()
    if text == SMALL:
        from vitos.nano.small import small_path

        return small_path()
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _model_in(folder)
    only_a_folder = text.count("/") > 1 or text.startswith((".", "/", "~"))
    if only_a_folder or not _on_hub(text):
        raise FileNotFoundError(f"{text}: there is no such folder{'' if only_a_folder else _meant(text)}")
    return path


def _model_in(folder: Path) -> Path:
    for place in (folder, folder / "model"):
        if (place / CONFIG).is_file():
            return place
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    more = f"; it has {', '.join(inside)} inside: name one of them" if inside else ""
    raise FileNotFoundError(f"{folder}: the folder holds no model (there is no {CONFIG}){more}")


def _on_hub(name: str) -> bool:
    """Whether the hub, or the cache of it, has a model of this id; False where the hub cannot be reached."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return True
        if constants.HF_HUB_OFFLINE:
            return False
        with urlopen(Request(hf_hub_url(name, CONFIG), method="HEAD"), timeout=HUB_SECONDS):
            return True
    except HTTPError as error:
        # A private model, or one that wants a licence accepted: the library says what to do.
        return error.code == 403 or (error.code == 401 and "/" in name)
    except (OSError, HFValidationError):
        return False


def _meant(name: str) -> str:
    """What to do about a name that is nothing: the embedded model or folder that is spelled much like it."""
    near = [*EMBEDDED, *(str(path) for path in Path().glob("*/") if not path.name.startswith("."))]
    parent = Path(name).parent
    if parent != Path() and parent.is_dir():
        near += [str(path) for path in parent.glob("*/")]
    close = difflib.get_close_matches(name, near, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    return (
        f", and the Hugging Face hub has no such model or cannot be reached{meant} Name a folder, "
        f"{', '.join(EMBEDDED[:-1])} or {EMBEDDED[-1]}."
    )
