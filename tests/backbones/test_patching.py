"""Replaced attributes are put back whatever happens, and nothing else in the package replaces them by hand."""

import ast
from pathlib import Path

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitos.backbones.attention import observe_attention
from vitos.backbones.patching import patched

SOURCE = Path(__file__).parents[2] / "src/vitos"


class Config:
    """An attribute behind a property, as in the library's configs."""

    def __init__(self):
        self._hidden, self.writes = "sdpa", []

    @property
    def implementation(self):
        return self._hidden

    @implementation.setter
    def implementation(self, value):
        self.writes.append(value)
        self._hidden = value


def test_a_property_is_set_and_restored_through_its_setter():
    config = Config()
    with patched(config, "implementation", "ours"):
        assert config.implementation == "ours"
    assert config.writes == ["ours", "sdpa"]


def test_a_method_of_the_class_is_uncovered_again():
    layer = torch.nn.Linear(2, 2)
    before = dict(vars(layer))
    with patched(layer, "forward", lambda x: x + 1):
        assert layer(torch.ones(2)).tolist() == [2, 2]
    assert vars(layer) == before
    assert "forward" not in vars(layer)


def test_what_another_library_put_on_the_instance_is_put_back():
    layer = torch.nn.Linear(2, 2)
    layer.forward = hook = lambda x: x * 3
    with patched(layer, "forward", lambda x: x + 1):
        assert layer(torch.ones(2)).tolist() == [2, 2]
    assert layer.forward is hook


def test_it_is_restored_when_the_block_raises_and_when_blocks_are_nested():
    layer = torch.nn.Linear(2, 2)

    def fail():
        assert layer.forward == "inner"
        raise KeyError

    with pytest.raises(KeyError), patched(layer, "forward", "outer"), patched(layer, "forward", "inner"):
        fail()
    assert "forward" not in vars(layer)
    with patched(layer, "bias", None), patched(layer, "bias", None):
        assert layer.bias is None
    assert isinstance(layer.bias, torch.nn.Parameter)


def test_an_attribute_that_does_not_exist_is_refused_before_anything_changes():
    layer = torch.nn.Linear(2, 2)
    before = dict(vars(layer))
    with pytest.raises(AttributeError), patched(layer, "foward", "ours"):
        pass
    assert vars(layer) == before


def test_a_failing_run_leaves_attention_and_the_librarys_registry_as_they_were(nano):
    visual, names = nano.model.model.visual, set(ALL_ATTENTION_FUNCTIONS)

    def run():
        raise MemoryError("too large")

    for job, error in ((run, MemoryError), (lambda: None, RuntimeError)):
        before = visual.config._attn_implementation
        with pytest.raises(error):
            observe_attention(visual, visual.blocks[-1].attn, job, None)
        assert visual.config._attn_implementation == before
        assert set(ALL_ATTENTION_FUNCTIONS) == names


def test_nothing_else_replaces_the_attributes_of_a_model():
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
            parts = [part for target in targets if target is not None for part in ast.walk(target)]
            names = {part.attr for part in parts if isinstance(part, ast.Attribute)}
            assert not names & {"forward", "_attn_implementation"}, f"{file}:{node.lineno}: use patched()"
