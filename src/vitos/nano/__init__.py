"""The embedded tiny model: real Qwen2.5-VL code and files, small enough to ship (see `weights/README.md`)."""

from pathlib import Path

NANO = "nano"
NANO_PATH = Path(__file__).parent / "weights"


def resolve_model_path(path: str | Path) -> str | Path:
    """`"nano"` stands for the embedded model; anything else is a folder or a hub id."""
    return NANO_PATH if str(path) == NANO else path
