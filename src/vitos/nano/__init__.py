"""The embedded tiny model: real Qwen2.5-VL code and files, small enough to ship (see `weights/README.md`)."""

from pathlib import Path

NANO = "nano"
NANO_PATH = Path(__file__).parent / "weights"


def resolve_model_path(path: str | Path) -> str | Path:
    """`"nano"` stands for the embedded model; anything else is a folder or a hub id.

    Raises:
        FileNotFoundError: for what can only be a folder (a hub id is `name` or `owner/name`) and is none.
    """
    text = str(path)
    if text == NANO:
        return NANO_PATH
    if (text.count("/") > 1 or text.startswith((".", "/", "~"))) and not Path(text).is_dir():
        raise FileNotFoundError(f"{text}: there is no such folder; name a checkpoint's folder, a hub id or {NANO}")
    return path
