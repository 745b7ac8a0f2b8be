"""What `vitos doctor` looks at: is everything here that a run needs, and what is missing for what.

Nothing heavy is imported to find out whether it is there (`importlib.metadata` says so); torch is imported only to
ask for its devices, and torchvision only in a process of its own, since a broken one can fail in many ways.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

Status = Literal["ok", "warn", "missing"]

# Distribution → version range (from, below), as in pyproject.toml.
REQUIRED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.9", "3"),
    "transformers": ("5.19", "6"),
    "accelerate": ("1.10", "2"),
    "datasets": ("4", None),
    "pillow": ("11", None),
}
# Distribution → what does not work without it.
OPTIONAL = {
    "peft": "low-rank adapters (model.lora)",
    "vllm": "the vLLM engine",
    "pydicom": "reading DICOM files",
    "nibabel": "reading NIfTI volumes",
    "fastapi": "the HTTP server (vitos serve)",
    "gradio": "the web demo (vitos demo)",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
}
NANO_FILES = ("config.json", "tokenizer.json", "model.safetensors")
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        status: "ok"; "warn", works with the limit that `detail` names; "missing", not there or not usable.
        detail: what was found.
        remedy: what to do, empty when nothing needs doing.
        required: False for parts that only some runs need.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = True


def diagnose() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [
        _python(),
        _vitos(),
        *(_package(name, *versions) for name, versions in REQUIRED.items()),
        *_devices(),
        _torchvision(),
        *(_optional(name, purpose) for name, purpose in OPTIONAL.items()),
        _nano(),
        _cores(),
        _memory(),
        _disk(Path.cwd()),
        _cache(hub_cache()),
    ]


def is_ready(findings: Iterable[Finding]) -> bool:
    """True if nothing required is missing."""
    return not any(f.required and f.status == "missing" for f in findings)


def render(findings: Iterable[Finding]) -> Table:
    """A table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for f in findings:
        optional = f.status == "missing" and not f.required
        color = "dim" if optional else {"ok": "green", "warn": "yellow", "missing": "red"}[f.status]
        mark = f"[{color}]{'optional' if optional else f.status}[/]"
        # The texts hold version ranges and paths, whose brackets are no markup.
        table.add_row(mark, *(text.replace("[", r"\[") for text in (f.name, f.detail, f.remedy)))
    return table


def hub_cache() -> Path:
    """Where Hugging Face libraries keep downloaded checkpoints."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _python() -> Finding:
    # The version needs no check: pip installs vitos only into a Python that it supports.
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _vitos() -> Finding:
    version = _version("vitos")
    if version is None:
        return Finding("vitos", "warn", "runs from a source folder, not installed", "pip install -e .")
    return Finding("vitos", "ok", version)


def _package(name: str, low: str, below: str | None) -> Finding:
    wanted = f">={low}" + (f",<{below}" if below else "")
    install = f"pip install '{name}{wanted}'"
    version = _version(name)
    if version is None:
        return Finding(name, "missing", "not installed", install)
    numbers = _numbers(version)
    if numbers < _numbers(low) or (below is not None and numbers >= _numbers(below)):
        return Finding(name, "missing", f"{version}, but vitos needs {wanted}", install)
    return Finding(name, "ok", version)


def _optional(name: str, purpose: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", f"not installed; needed for {purpose}", f"pip install {name}", required=False)
    return Finding(name, "ok", version, required=False)


def _devices() -> Iterator[Finding]:
    """Every GPU with its memory and whether it computes in bfloat16, or that there is none."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("devices", "missing", f"torch is installed, but broken: {error}", "reinstall torch")
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPU"
        yield Finding(
            "devices",
            "warn",
            f"no CUDA GPU ({built}): enough for nano, not for a 7B model",
            "with a GPU: check nvidia-smi and install a torch build for its CUDA version",
            required=False,
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        detail = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if major >= 8:
            yield Finding(f"cuda:{index}", "ok", f"{detail}, bfloat16")
        else:
            remedy = "set train.bf16: false and model.dtype: float16 or float32"
            yield Finding(f"cuda:{index}", "warn", f"{detail}, no bfloat16 (capability {major}.{minor})", remedy)


def _torchvision() -> Finding:
    """vitos does not use torchvision, but transformers imports a present one, so a broken one breaks both."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, and not needed", required=False)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", "import torchvision; print(torchvision.__version__)"]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "torchvision", "warn", "did not import within 120 s", "pip uninstall torchvision", required=False
        )
    if run.returncode == 0:
        return Finding("torchvision", "ok", f"{run.stdout.strip()} (not needed)", required=False)
    reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    remedy = "pip uninstall torchvision (vitos does not need it), or install the build that fits torch"
    return Finding("torchvision", "warn", f"does not import: {reason}", remedy, required=False)


def _nano() -> Finding:
    folder = importlib.resources.files("vitos") / "nano" / "weights"
    absent = [name for name in NANO_FILES if not (folder / name).is_file()]
    if absent:
        return Finding("nano", "missing", f"the embedded model lacks {', '.join(absent)}", "reinstall vitos")
    return Finding("nano", "ok", "the embedded model is complete")


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", "ok", f"{count} usable")


def _memory() -> Finding:
    free = free_memory()
    if free is None:
        return Finding("memory", "ok", "unknown on this system", required=False)
    detail = f"{free / GIB:.1f} GiB free"
    if free < 4 * GIB:
        return Finding("memory", "warn", detail, "close other programs; the quickstart wants about 4 GiB")
    return Finding("memory", "ok", detail)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.0f} GiB free in the current directory"
    if free < 5 * GIB:
        remedy = "free some space, or set output_dir to another disk; a 7B checkpoint takes about 16 GiB"
        return Finding("disk", "warn", detail, remedy)
    return Finding("disk", "ok", detail)


def _cache(cache: Path) -> Finding:
    """Try to write at the cache, or at the nearest folder above it that exists: permission bits alone can mislead."""
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set HF_HOME to a folder that can be written"
        return Finding("cache", "warn", f"{cache} cannot be written: {error.strerror}", remedy)
    return Finding("cache", "ok", f"{cache} can be written")


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a process can still take, within a container's limit (cgroup v2); None where neither file exists."""
    candidates = []
    if meminfo.is_file() and (match := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)):
        candidates.append(int(match[1]) * 1024)
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        candidates.append(max(0, int(most) - int(used.read_text())))
    return min(candidates, default=None)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor of "2.13.0+cpu", "5" or "6.0rc1"."""
    found = re.findall(r"\d+", re.split(r"[a-z+-]", version, maxsplit=1)[0])
    major, minor = [*map(int, found), 0, 0][:2]
    return major, minor
