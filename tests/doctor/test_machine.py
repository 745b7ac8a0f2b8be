import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from vitos.doctor import machine as doctor
from vitos.doctor.machine import Check, checks_table, diagnose, free_memory, hub_cache, is_ready, nearest_folder


@pytest.fixture
def versions(monkeypatch):
    """Installed distributions, as importlib.metadata tells them; others count as absent."""
    installed = {}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


def by_name(checks):
    return {check.name: check for check in checks}


def test_importing_the_doctor_imports_no_torch():
    code = (
        "import sys, vitos.doctor.machine; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_diagnosis_of_this_machine():
    checks = by_name(diagnose())
    assert checks["torch"].status == "ok"
    assert checks["transformers"].detail == importlib.metadata.version("transformers")
    assert checks["python"].status == "ok"
    assert {"cores", "memory", "disk", "cache", "nano", "torchvision"} <= set(checks)
    assert {"peft", "vllm", "pydicom", "nibabel", "gradio", "tensorboard", "wandb"} <= set(checks)


def test_ranges_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [name + f">={low}" + (f",<{below}" if below else "") for name, (low, below) in doctor.REQUIRED.items()]
    assert set(wanted) <= set(project["dependencies"])


def test_optional_packages_are_those_of_the_extras_that_install_them():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, (extra, _) in doctor.OPTIONAL.items():
        assert name in {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]}


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("5.19.0", "ok"),
        ("5.23.0", "ok"),
        ("5.19", "ok"),
        ("5.9.1", "missing"),
        ("4.57.0", "missing"),
        ("6.0.0", "missing"),
        ("6.0rc1", "missing"),
        ("5.100.0.dev0+local", "ok"),
        (None, "missing"),
    ],
)
def test_version_ranges(versions, version, status):
    if version is not None:
        versions["transformers"] = version
    check = doctor._package("transformers", "5.19", "6")
    assert check.status == status
    assert ("pip install 'transformers>=5.19,<6'" in check.remedy) == (status == "missing")


def test_absent_extras_are_no_obstacle_but_say_what_for(versions):
    check = doctor._optional("peft", "lora", "low-rank adapters")
    assert (check.status, check.required) == ("missing", False)
    assert "low-rank adapters" in check.detail
    assert check.remedy == "pip install 'vitos[lora]'"
    assert is_ready([check])
    assert not is_ready([check, doctor._package("torch", "2.9", "3")])


def test_absent_torch_is_reported_not_raised(versions, monkeypatch):
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name.startswith("torch") else find_spec(name)
    )
    checks = by_name(diagnose())
    assert checks["torch"].status == "missing"
    assert "devices" not in checks
    assert not is_ready(checks.values())


def test_broken_torch_is_reported(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [m for m in sys.modules if m == "torch" or m.startswith("torch.")]:
        monkeypatch.delitem(sys.modules, name)
    (check,) = doctor._devices()
    assert check.status == "missing"
    assert "libcudart.so.13" in check.detail


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ("__version__ = '0.28.0'", "ok", "0.28.0"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "warn", "nms does not exist"),
        ("import os; os._exit(11)", "warn", "exit code 11"),
    ],
)
def test_torchvision_is_tried_in_its_own_process(monkeypatch, tmp_path, body, status, expected):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor._torchvision()
    assert check.status == status
    assert expected in check.detail
    assert "torchvision" not in sys.modules
    assert is_ready([check])


def test_gpus_with_and_without_bfloat16(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (60 * 1024**3, 80 * 1024**3))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("H100", "V100")[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 0))[i])
    new, old = doctor._devices()
    assert (new.name, new.status, new.detail) == ("cuda:0", "ok", "H100, 60 of 80 GiB free, bfloat16")
    assert (old.name, old.status) == ("cuda:1", "warn")
    assert "no bfloat16 (capability 7.0)" in old.detail


def test_memory_within_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000000 kB\nMemAvailable:   16000000 kB\n")
    assert free_memory(meminfo, tmp_path) == 16_000_000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(meminfo, tmp_path) == 16_000_000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(meminfo, tmp_path) == 4000
    assert free_memory(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a/b", "HF_HOME": "/c"}, "/a/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_hub_cache_as_huggingface_hub_has_it(monkeypatch, environment, expected):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected).expanduser()
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert Path(done.stdout.strip()) == hub_cache()


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    assert doctor._cache(tmp_path / "not" / "yet").status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    check = doctor._cache(tmp_path / "file" / "hub")
    assert check.status == "warn"
    assert "HF_HOME" in check.remedy


def test_the_nearest_folder_above_a_path_that_is_not_there_yet(tmp_path, monkeypatch):
    assert nearest_folder(tmp_path / "a/b/c") == nearest_folder(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_folder(Path("runs/mine")) == tmp_path


def test_incomplete_nano_is_named(monkeypatch, tmp_path):
    (tmp_path / "nano" / "weights").mkdir(parents=True)
    monkeypatch.setattr(doctor.importlib.resources, "files", lambda package: tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "nano" / "weights" / name).write_text("{}")
    check = doctor._nano()
    assert check.status == "missing"
    assert check.detail == "the embedded model lacks model.safetensors"
    (tmp_path / "nano" / "weights" / "model.safetensors").write_text("")
    assert doctor._nano().status == "ok"


def test_rendering_shows_every_check_and_no_markup():
    checks = [
        Check("torch", "ok", "2.13.0"),
        Check("nano", "missing", "lacks [config.json]", "reinstall"),
        Check("vllm", "missing", "not installed", "pip install 'vllm[x]'", required=False),
    ]
    console = Console(width=119, record=True, file=io.StringIO())
    console.print(checks_table(checks))
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ok", "missing", "optional"]
    assert "lacks [config.json]" in lines[2]
    assert "pip install 'vllm[x]'" in lines[3]
