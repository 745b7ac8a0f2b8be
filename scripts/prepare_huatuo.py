"""Make a folder of `FreedomIntelligence/HuatuoGPT-Vision-7B-hf` do what the authors' own code does.

    python scripts/prepare_huatuo.py models/HuatuoGPT-Vision-7B-hf

Writes two files: `preprocessor_config.json`, so that the image is padded to a square with CLIP's mean colour before it
is resized (the original's `image_aspect_ratio: pad`; CLIP's image processor would cut the longer side's ends),
and `chat_template.jinja`, the prompt of the authors' `cli/main.py`. Weights, config and tokenizer stay as they are.
Source: github.com/FreedomIntelligence/HuatuoGPT-Vision, cli/main.py and the checkpoint's config.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def prepare(folder: Path) -> None:
    """Write both files.

    Raises:
        FileNotFoundError: if `folder` holds no checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; download the checkpoint there first")
    side = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    LlavaImageProcessorPil(**side, do_pad=True).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)  # the library would prefer it


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]))
