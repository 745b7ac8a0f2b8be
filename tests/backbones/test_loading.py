"""Loading a checkpoint: the chat template is the one that the library's own processor would use."""

import json

import pytest
import torch
from tests.backbones.families import FAMILIES_BY_NAME, HUATUO_TEMPLATE, VICUNA_TEMPLATE
from transformers import AutoProcessor

from vitos.backbones import load_backbone

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the cyst?"}]}]
OTHER = "{% for message in messages %}OTHER {{ message['role'] }}{% endfor %}"


def as_json(folder, template):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")


def as_jinja(folder, template):
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def in_processor_config(folder, template):
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}), encoding="utf-8")


def in_tokenizer_config(folder, template):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}), encoding="utf-8")


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(*places)`: a LLaVA checkpoint whose templates stand where `places` put them, and nowhere else."""

    def make(*places):
        family = FAMILIES_BY_NAME["llava, HuatuoGPT-Vision"]
        family.backbone().model.save_pretrained(tmp_path)
        family.processor().save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        family.backbone().image_processor.save_pretrained(tmp_path)
        for place, template in places:
            place(tmp_path, template)
        return tmp_path

    return make


@pytest.mark.parametrize(
    "places",
    [
        [(as_json, HUATUO_TEMPLATE)],
        [(as_jinja, HUATUO_TEMPLATE)],
        [(in_processor_config, HUATUO_TEMPLATE)],
        [(as_json, HUATUO_TEMPLATE), (in_tokenizer_config, OTHER)],
        [(as_json, HUATUO_TEMPLATE), (as_jinja, OTHER)],
        [(in_processor_config, HUATUO_TEMPLATE), (as_json, OTHER)],
    ],
    ids=lambda places: " over ".join(place.__name__ for place, _ in places),
)
def test_the_template_is_the_one_of_the_librarys_processor(checkpoint, picture, places):
    folder = checkpoint(*places)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    expected = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    backbone = load_backbone(folder)
    with torch.no_grad():
        visuals = backbone.encode([picture(80, 60)])
    prompt = backbone.build_prompt("<image>Where is the cyst?", visuals)
    assert expected == "<|user|>\n<image>\nWhere is the cyst?<|assistant|>\n"
    written = backbone.tokenizer.decode(prompt.input_ids)
    assert written == expected.replace("<image>", "<image>" * visuals[0].grid.num_tokens)


def test_a_template_of_the_tokenizer_alone_is_used(checkpoint):
    folder = checkpoint((in_tokenizer_config, VICUNA_TEMPLATE))
    assert load_backbone(folder).tokenizer.chat_template == VICUNA_TEMPLATE


def test_a_checkpoint_without_a_template_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"neither the tokenizer nor the processor .* chat_template\.jinja"):
        load_backbone(checkpoint())
