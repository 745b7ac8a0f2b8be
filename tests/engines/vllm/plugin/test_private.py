"""The private parts of vLLM that the plug-in overrides or calls, against those of the version it was written for.

Only sources are read, so any vLLM can be looked at without installing or importing it, the build for GPUs as well:

    python -m tests.engines.vllm.plugin.test_private WHEEL_OR_SITE_PACKAGES   what has changed there
    python -m tests.engines.vllm.plugin.test_private SITE_PACKAGES --record   write down this version

`test_what_the_plug_in_overrides_is_as_it_was` does so for the version that `make test-vllm` installs.
"""

import ast
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest

RECORDED = Path(__file__).with_name("private.json")
MODELS = "vllm/model_executor/models"
# file: functions and methods, as "Class.method", and module-level names
PLACES = {
    "vllm/multimodal/processing/processor.py": [
        "BaseMultiModalProcessor._apply_hf_processor_main",
        "BaseMultiModalProcessor._get_mm_fields_config",
        "BaseMultiModalProcessor._get_prompt_updates",
        "BaseMultiModalProcessor._get_mm_hashes",
        "BaseMultiModalProcessor._get_cache_missing_processor_kwargs",
        "PromptUpdateDetails.select_token_id",
    ],
    f"{MODELS}/qwen2_5_vl.py": [
        "Qwen2_5_VLForConditionalGeneration.embed_multimodal",
        "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
        "Qwen2_5_VLForConditionalGeneration.load_weights",
    ],
    f"{MODELS}/qwen3_vl.py": [
        "Qwen3VLForConditionalGeneration.__init__",
        "Qwen3VLForConditionalGeneration.embed_multimodal",
        "Qwen3VLForConditionalGeneration.get_mrope_input_positions",
        "Qwen3VLForConditionalGeneration._get_deepstack_input_embeds",
        "Qwen3VLForConditionalGeneration._compute_deepstack_embeds",
        "Qwen3VLMultiModalProcessor._apply_hf_processor_main",
        "Qwen3VLMultiModalProcessor._get_prompt_updates",
    ],
    f"{MODELS}/interns1.py": [
        "InternS1ForConditionalGeneration.embed_multimodal",
        "InternS1MultiModalProcessor._apply_hf_processor_main",
        "InternS1MultiModalProcessor._get_mm_fields_config",
        "InternS1MultiModalProcessor._get_prompt_updates",
        "InternS1ProcessingInfo.get_hf_processor",
    ],
    f"{MODELS}/llava.py": [
        "LlavaForConditionalGeneration.embed_multimodal",
        "BaseLlavaProcessingInfo.get_max_image_tokens",
    ],
    f"{MODELS}/config.py": ["VerifyAndUpdateConfig.verify_and_update_model_config"],
    "vllm/v1/sample/logits_processor/interface.py": [
        "LogitsProcessor.__init__",
        "LogitsProcessor.apply",
        "LogitsProcessor.is_argmax_invariant",
        "LogitsProcessor.update_state",
    ],
    "vllm/inputs/engine.py": ["mm_input", "tokens_input"],
    "vllm/multimodal/inputs.py": [
        "PlaceholderRange.offset",
        "PlaceholderRange.length",
        "PlaceholderRange.is_embed",
        "MultiModalFieldElem.data",
        "MultiModalFieldElem.field",
        "BaseMultiModalField.keep_on_cpu",
        "MultiModalFieldConfig.batched",
        "MultiModalFieldConfig.flat_from_sizes",
    ],
    "vllm/v1/engine/llm_engine.py": ["LLMEngine.add_request", "LLMEngine.step", "LLMEngine.reset_encoder_cache"],
    "vllm/entrypoints/llm.py": ["LLM.apply_model", "LLM.sleep", "LLM.wake_up", "LLM.reset_prefix_cache"],
    "vllm/_custom_ops.py": ["_supports_onednn"],
}


def source(root, name):
    """The text of a file in a wheel or in a folder of installed packages; None if it is not there."""
    if root.suffix == ".whl":
        with zipfile.ZipFile(root) as wheel:
            return wheel.read(name).decode() if name in wheel.namelist() else None
    return (root / name).read_text(encoding="utf-8") if (root / name).is_file() else None


def signature(text, name):
    """Arguments of a function, or the annotation of an attribute; "is there" for other names; None if it is absent."""
    body, (*owners, last) = ast.parse(text).body, name.split(".")
    for owner in owners:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    inside = [node for outer in body for node in (ast.walk(outer) if not owners else [outer])]
    for node in inside:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == last:
            return ast.unparse(node.args)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == last:
            return ast.unparse(node.annotation)
        if isinstance(node, ast.Assign) and last in [ast.unparse(target) for target in node.targets]:
            return "is there"
    return None


def signatures(root):
    """All places with their signatures."""
    found = {}
    for file, names in PLACES.items():
        text = source(root, file)
        for name in names:
            found[f"{file}:{name}"] = None if text is None else signature(text, name)
    return found


def changes(root):
    """What differs from the recorded version, one line for each place."""
    recorded, found = json.loads(RECORDED.read_text()), signatures(root)
    return [
        f"{place}: {recorded.get(place)} -> {found[place]}" for place in found if found[place] != recorded.get(place)
    ]


def test_what_the_plug_in_overrides_is_as_it_was():
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("needs vLLM: make test-vllm")
    assert changes(Path(spec.origin).parents[1]) == []


def test_every_place_is_recorded_and_was_found():
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded) == {f"{file}:{name}" for file, names in PLACES.items() for name in names}
    assert all(recorded.values())


def test_a_change_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PLACES", {"engine.py": ["Engine.step", "Engine.rate", "Engine.gone", "switch"]})
    monkeypatch.setitem(globals(), "RECORDED", tmp_path / "private.json")
    text = (
        "switch = 1\nclass Engine:\n    rate: int = 0\n    def step(self, n: int = 1): ...\n    def gone(self): ...\n"
    )
    (tmp_path / "engine.py").write_text(text)
    RECORDED.write_text(json.dumps(signatures(tmp_path)))
    assert changes(tmp_path) == []
    (tmp_path / "engine.py").write_text(text.replace("n: int", "m: int").replace("gone", "went"))
    assert changes(tmp_path) == [
        "engine.py:Engine.step: self, n: int=1 -> self, m: int=1",
        "engine.py:Engine.gone: self -> None",
    ]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if "--record" in sys.argv:
        RECORDED.write_text(json.dumps(signatures(root), indent=1) + "\n")
    print("\n".join(changes(root)) or "nothing has changed")
