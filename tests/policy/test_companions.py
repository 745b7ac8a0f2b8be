"""What a base checkpoint had beside its weights is there after saving; plain transformers generates from it alone."""

import os
import stat

import pytest
import torch
from tests.backbones.families import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor

from vitos.policy.vlm import SparseVLM

# Combined processors that load without torchvision.
PLAIN = [family for family in FAMILIES if family.name.startswith(("llava", "gemma3"))]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]


@torch.no_grad()
def generated(folder, picture):
    """Tokens that the library alone generates about a picture."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chat = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=picture, text=chat, return_tensors="pt", add_special_tokens=False)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.parametrize("family", PLAIN, ids=lambda family: family.name)
def test_plain_transformers_generates_the_same_from_a_saved_copy(family, picture, tmp_path):
    base, copy, image = tmp_path / "base", tmp_path / "copy", picture(100, 80)
    backbone = family.backbone()
    backbone.model.save_pretrained(base)
    family.processor().save_pretrained(base)
    (base / "LICENSE.txt").write_text("terms")
    (base / "optimizer.pt").write_bytes(b"a run's own")
    SparseVLM.from_pretrained(base, device="cpu").save_pretrained(copy)
    small = {file.name for file in base.iterdir()} - {"optimizer.pt"}
    assert small <= {file.name for file in copy.iterdir()}
    assert not (copy / "optimizer.pt").exists()
    assert (copy / "LICENSE.txt").read_text() == "terms"
    assert generated(copy, image) == generated(base, image)
    again = tmp_path / "again"
    SparseVLM.from_pretrained(copy, device="cpu").save_pretrained(again)
    assert {file.name for file in copy.iterdir()} == {file.name for file in again.iterdir()}


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_saved_files_have_the_permissions_of_new_files(warm_policy, tmp_path, umask):
    before = os.umask(umask)
    try:
        warm_policy.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}
