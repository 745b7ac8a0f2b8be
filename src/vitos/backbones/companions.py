"""The small files of a checkpoint that neither model, tokenizer nor image processor writes, such as
`processor_config.json`.

They are read when a checkpoint is loaded and written with every copy of it, so that what plain `transformers` or vLLM
could load before training, they can load afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

LARGEST = 16 << 20
PROCESSOR = "processor_config.json"
# What a repository on the hub may have; a folder is listed.
ON_HUB = (
    PROCESSOR,
    "chat_template.json",
    "video_preprocessor_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
# Written anew, or of a training run.
_NOT_COPIED = ("config.json", "tokenizer.json", "vitos.json", "README.md", "COMPLETE", "trainer_state.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def companions(path: str | Path) -> dict[str, bytes]:
    """Content of the small files of a checkpoint, by name.

    Args:
        path: folder of the checkpoint, or its id on the Hugging Face hub.
    """
    if Path(path).is_dir():
        files = [file for file in sorted(Path(path).iterdir()) if file.is_file() and file.stat().st_size <= LARGEST]
    else:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = (cached_file(str(path), name, **quiet) for name in ON_HUB)
        files = [Path(file) for file in found if file is not None]
    return {
        file.name: file.read_bytes()
        for file in files
        if file.name not in _NOT_COPIED and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS)
    }


def write_companions(files: Mapping[str, bytes], image_processor: Any, folder: Path) -> None:
    """Write them to a folder where the model, the tokenizer and the image processor are already.

    A file that is there stays as it is. Image settings inside of `processor_config.json` become those in force.
    """
    for name, content in files.items():
        if (folder / name).exists():
            continue
        if name == PROCESSOR:
            settings = json.loads(content)
            if "image_processor" in settings:
                settings["image_processor"] = json.loads(image_processor.to_json_string())
            content = (json.dumps(settings, indent=2) + "\n").encode()
        (folder / name).write_bytes(content)
