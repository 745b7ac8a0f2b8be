"""The plug-in registers with vLLM (here a stand-in) the models that the families name, wherever they come from."""

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vitos.backbones import families
from vitos.backbones.base import VllmModel
from vitos.engines.vllm import plugin

SOURCE = Path(__file__).parents[4] / "src"


@pytest.fixture
def fake_vllm(monkeypatch):
    """`models` and `configs` that were registered with a stand-in for vLLM; its `version` can be changed."""
    told = SimpleNamespace(models={}, configs={}, module=ModuleType("vllm"))
    told.module.__version__ = "0.32.1+cpu"
    told.module.ModelRegistry = SimpleNamespace(register_model=told.models.__setitem__)
    config = ModuleType("vllm.model_executor.models.config")
    config.MODELS_CONFIG_MAP, config.VerifyAndUpdateConfig = told.configs, type("VerifyAndUpdateConfig", (), {})
    parents = ("vllm.model_executor", "vllm.model_executor.models")
    ours = "vitos.engines.vllm.plugin.rope"  # imports vLLM, so it is imported again here and put back afterwards
    modules = {"vllm": told.module, config.__name__: config} | {name: ModuleType(name) for name in parents}
    for name, module in (modules | {ours: None}).items():
        monkeypatch.setitem(sys.modules, name, module)
    del sys.modules[ours]
    return told


def defined(place):
    """Whether "module:Class" names a class in the sources, without importing it."""
    module, _, name = place.partition(":")
    tree = ast.parse(SOURCE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def test_the_models_of_all_families_are_registered_without_being_imported(fake_vllm):
    before = set(sys.modules)
    plugin.register()
    assert set(fake_vllm.models) == {
        "VitosQwen2_5_VLForConditionalGeneration",
        "VitosLlavaForConditionalGeneration",
        "VitosQwen3VLForConditionalGeneration",
        "VitosInternVLForConditionalGeneration",
    }
    assert all(defined(place) for place in fake_vllm.models.values())
    assert not {place.partition(":")[0] for place in fake_vllm.models.values()} & (set(sys.modules) - before)
    assert {name: config.__name__ for name, config in fake_vllm.configs.items()} == {
        "VitosLlavaForConditionalGeneration": "ThreeAxes",
        "VitosInternVLForConditionalGeneration": "ThreeAxes",
    }


def test_a_family_names_its_model_itself(fake_vllm, monkeypatch):
    monkeypatch.setattr(families()["gemma3"], "vllm_model", VllmModel("Other", "my_package.other:Other"))
    plugin.register()
    assert fake_vllm.models["Other"] == "my_package.other:Other"
    assert "Other" not in fake_vllm.configs
    assert plugin.architecture("gemma3") == "Other"


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0"])
def test_another_version_of_vllm_is_left_alone_with_a_warning(fake_vllm, monkeypatch, version):
    fake_vllm.module.__version__ = version
    said = []  # not caplog: vLLM sets up logging in its own way, so `make test-vllm` runs without pytest's plug-in
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *values: said.append(text % values))
    plugin.register()
    assert not fake_vllm.models
    assert not fake_vllm.configs
    assert version in said[0]


def test_a_version_of_which_only_the_sources_were_compared_is_taken_with_a_warning(fake_vllm, monkeypatch):
    fake_vllm.module.__version__ = "0.33.0"
    said = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *values: said.append(text % values))
    plugin.register()
    assert len(fake_vllm.models) == 4
    assert "has not been run with 0.33.0" in said[0]


def test_every_registered_name_is_found_by_model_type(fake_vllm):
    plugin.register()
    models = {name: family.vllm_model for name, family in families().items() if family.vllm_model}
    names = {name: plugin.architecture(name) for name, model in models.items() if model.runs(name)}
    assert set(names.values()) == set(fake_vllm.models)
    assert set(names) == {"qwen2_5_vl", "qwen3_vl", "internvl", "llava"}


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl_moe", "bert"])
def test_a_family_that_vllm_cannot_run_is_refused(model_type):
    with pytest.raises(
        ValueError, match=f"no vLLM model for '{model_type}'; the plug-in has internvl, llava, qwen2_5_vl, qwen3_vl"
    ):
        plugin.architecture(model_type)
