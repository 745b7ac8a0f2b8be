"""The examples in docstrings run, from any folder, and write nothing outside of temporary folders."""

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import vitos

SOURCE = Path(vitos.__file__).parent
# Modules of optional extras, and the one that is a program.
SKIPPED = ("vitos.__main__", "vitos.engines.vllm", "vitos.eval.lmms_plugin", "vitos.serve")


def modules_with_examples():
    """Names of the modules whose source has an example; nothing is imported."""
    for file in sorted(SOURCE.rglob("*.py")):
        name = ".".join(("vitos", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        if not name.startswith(SKIPPED) and ">>> " in file.read_text(encoding="utf-8"):
            yield name


def run_examples(module):
    """Number of examples in a module, and what is said about those that fail."""
    said, runner = [], doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=said.append)
    return runner.tries, "".join(said)


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tries, failures = run_examples(importlib.import_module(name))
    assert not failures, failures
    assert tries > 0, f"{name} has a >>> that is not in the docstring of a class or function"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in vitos.__all__ if name != "__version__"])
def test_every_public_name_has_an_example(name):
    assert ">>> " in (inspect.getdoc(getattr(vitos, name)) or ""), f"vitos.{name} has no example in its docstring"


def test_an_example_that_fails_is_found():
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert "Expected:\n    3\nGot:\n    2" in run_examples(module)[1]
