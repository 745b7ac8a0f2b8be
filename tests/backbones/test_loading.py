"""Loading a checkpoint: the chat template is the one that the library's own processor would use."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests.backbones.families import FAMILIES_BY_NAME
from tests.backbones.family_llava import HUATUO_TEMPLATE, VICUNA_TEMPLATE
from transformers import AutoProcessor

from vitos.backbones import load_backbone

ROOT = Path(__file__).parents[2]

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
    """`checkpoint(*places)`: a LLaVA checkpoint with chat templates only in the files that `places` write."""

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


def test_huatuo_is_prepared_as_its_authors_run_it(checkpoint, picture):
    """As in their cli.py: `<|user|>`, one line per image, the text, `<|assistant|>`; padded to a square, not cut."""
    folder = checkpoint((as_json, OTHER))
    config = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": 336, "size": 336}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    spec = importlib.util.spec_from_file_location("prepare_huatuo", ROOT / "scripts/prepare_huatuo.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.prepare(folder)
    backbone = load_backbone(folder)
    chat = backbone.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert chat == "<|user|>\n<image>\nWhere is the cyst?\n<|assistant|>\n"
    with torch.no_grad():
        (visual,) = backbone.encode([picture(200, 100)])
    assert visual.grid.views[0].rect.as_tuple() == pytest.approx((0, -0.5, 1, 1.5))
