"""The checks of `vitos doctor`: whether this machine has what a run needs, and what cannot be done without the rest.

Whether a package is installed is read from its metadata, without an import. torch is imported to ask for its devices;
torchvision only in another process, because a broken one can fail in many ways.
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

from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "warn", "missing"]

# Distribution → version range (from, below), the same as in pyproject.toml.
REQUIRED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.9", "3"),
    "transformers": ("5.19", "6"),
    "accelerate": ("1.10", "2"),
    "pillow": ("11", None),
}
# Distribution → (extra of vitos that installs it, what does not work without it).
OPTIONAL = {
    "datasets": ("hub", "data sets of the hub (hub:owner/name)"),
    "peft": ("lora", "low-rank adapters (model.lora)"),
    "bitsandbytes": ("quant", "frozen weights in 4 bits (model.quantization)"),
    "vllm": ("vllm", "the vLLM engine"),
    "pydicom": ("dicom", "reading DICOM files"),
    "nibabel": ("nifti", "reading NIfTI volumes"),
    "fastapi": ("serve", "the HTTP server (vitos serve)"),
    "gradio": ("demo", "the web demo (vitos demo)"),
    "tensorboard": ("trackers", "report_to: tensorboard"),
    "trackio": ("trackers", "report_to: trackio"),
    "wandb": ("trackers", "report_to: wandb"),
}
NANO_FILES = ("config.json", "tokenizer.json", "model.safetensors")
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """The result of one check, a line of the table.

    Attributes:
        name: the part that was checked.
        status: "ok"; "warn" if it works within the limit that `detail` names; "missing" if it cannot be used.
        detail: what was found.
        remedy: what to do; empty if there is nothing to do.
        required: whether every run needs the part.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = True


def diagnose() -> list[Check]:
    """Check everything. Never raises for what it finds."""
    return [
        _python(),
        _vitos(),
        *(_package(name, *versions) for name, versions in REQUIRED.items()),
        *_devices(),
        _torchvision(),
        *(_optional(name, *known) for name, known in OPTIONAL.items()),
        _nano(),
        _cores(),
        _memory(),
        _disk(Path.cwd()),
        _cache(hub_cache()),
    ]


def is_ready(checks: Iterable[Check]) -> bool:
    """Whether nothing required is missing."""
    return not any(c.required and c.status == "missing" for c in checks)


def checks_table(checks: Iterable[Check]) -> Table:
    """The checks as a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for c in checks:
        optional = c.status == "missing" and not c.required
        color = "dim" if optional else {"ok": "green", "warn": "yellow", "missing": "red"}[c.status]
        # Escaped: version ranges and paths may hold brackets, which are not markup.
        table.add_row(
            f"[{color}]{'optional' if optional else c.status}[/]", *map(escape, (c.name, c.detail, c.remedy))
        )
    return table


def nearest_folder(path: Path) -> Path:
    """`path` itself if it exists, else the nearest folder above it that does."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def hub_cache() -> Path:
    """Folder in which Hugging Face libraries keep downloaded checkpoints."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _python() -> Check:
    # No version check: pip installs vitos only into a Python that it supports.
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _vitos() -> Check:
    version = _version("vitos")
    if version is None:
        return Check("vitos", "warn", "runs from a source folder, not installed", "pip install -e .")
    return Check("vitos", "ok", version)


def _package(name: str, low: str, below: str | None) -> Check:
    wanted = f">={low}" + (f",<{below}" if below else "")
    install = f"pip install '{name}{wanted}'"
    version = _version(name)
    if version is None:
        return Check(name, "missing", "not installed", install)
    numbers = _numbers(version)
    if numbers < _numbers(low) or (below is not None and numbers >= _numbers(below)):
        return Check(name, "missing", f"{version}, but vitos needs {wanted}", install)
    return Check(name, "ok", version)


def _optional(name: str, extra: str, purpose: str) -> Check:
    version = _version(name)
    if version is None:
        install = f"pip install 'vitos[{extra}]'"
        return Check(name, "missing", f"not installed; needed for {purpose}", install, required=False)
    return Check(name, "ok", version, required=False)


def _devices() -> Iterator[Check]:
    """One check for each GPU, with its memory and whether it computes in bfloat16; or one that says there is none."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("devices", "missing", f"torch is installed, but broken: {error}", "reinstall torch")
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPU"
        yield Check(
            "devices",
            "warn",
            f"no CUDA GPU ({built}): enough for nano, not for a 7B model",
            "if there is a GPU, check nvidia-smi and install a torch build for its CUDA version",
            required=False,
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        detail = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if major >= 8:
            yield Check(f"cuda:{index}", "ok", f"{detail}, bfloat16")
        else:
            remedy = "set train.bf16: false and model.dtype: float16 or float32"
            yield Check(f"cuda:{index}", "warn", f"{detail}, no bfloat16 (capability {major}.{minor})", remedy)


def _torchvision() -> Check:
    """vitos does not use torchvision, but transformers imports it if it is installed, so a broken one breaks both."""
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "ok", "not installed, and not needed", required=False)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", "import torchvision; print(torchvision.__version__)"]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Check("torchvision", "warn", "did not import within 120 s", "pip uninstall torchvision", required=False)
    if run.returncode == 0:
        return Check("torchvision", "ok", f"{run.stdout.strip()} (not needed)", required=False)
    reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    remedy = "pip uninstall torchvision (vitos does not need it), or install the build that fits torch"
    return Check("torchvision", "warn", f"does not import: {reason}", remedy, required=False)


def _nano() -> Check:
    folder = importlib.resources.files("vitos") / "nano" / "weights"
    absent = [name for name in NANO_FILES if not (folder / name).is_file()]
    if absent:
        return Check("nano", "missing", f"the embedded model lacks {', '.join(absent)}", "reinstall vitos")
    return Check("nano", "ok", "the embedded model is complete")


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", "ok", f"{count} usable")


def _memory() -> Check:
    free = free_memory()
    if free is None:
        return Check("memory", "ok", "unknown on this system", required=False)
    detail = f"{free / GIB:.1f} GiB free"
    if free < 4 * GIB:
        return Check("memory", "warn", detail, "close other programs; the quickstart wants about 4 GiB")
    return Check("memory", "ok", detail)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.0f} GiB free in the current directory"
    if free < 5 * GIB:
        remedy = "free some space, or set output_dir to another disk; a 7B checkpoint takes about 16 GiB"
        return Check("disk", "warn", detail, remedy)
    return Check("disk", "ok", detail)


def _cache(cache: Path) -> Check:
    """Write a file to the cache, or to the nearest folder above it: permission bits alone can mislead."""
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(cache)):
            pass
    except OSError as error:
        remedy = "set HF_HOME to a folder that you may write to"
        return Check("cache", "warn", f"{cache} cannot be written: {error.strerror}", remedy)
    return Check("cache", "ok", f"{cache} can be written")


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that a process can still take, within a container's limit (cgroup v2).

    None if neither file exists.
    """
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
    """Major and minor version of "2.13.0+cpu", "5" or "6.0rc1"."""
    found = re.findall(r"\d+", re.split(r"[a-z+-]", version, maxsplit=1)[0])
    major, minor = [*map(int, found), 0, 0][:2]
    return major, minor
