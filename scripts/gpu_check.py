"""A proof for a GPU, in one command and at most eight minutes: `python scripts/gpu_check.py --out runs/gpu`.

It runs from a bare folder with torch, transformers, accelerate and peft: `PYTHONPATH=src` and nothing else. Nothing is
downloaded, vLLM is not used, no package is installed; pydantic may be missing (`gpu/pydantic_stand_in.py`).

    (a) invariants   every family in float32 and bfloat16 against the unmodified library
    (b) updates      the dual stream at the shapes of Qwen2.5-VL-3B and 7B: speed, and memory against the estimate
    (c) plans        each plan against one dense pass at 1024 px
    (d) quickstart   the shipped model and its recipe, against the CPU

Each part has a time box. `results.json` and `table.md` are written after each row, so that a machine that is taken
away leaves what it measured. `vitos doctor --recipe … --measured results.json` reads the speeds. The exit code is 1 if
a row failed or a part did not finish.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOXES = {"invariants": 60, "updates": 150, "plans": 100, "quickstart": 150}
"""Seconds per part; 20 are left for imports."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "tokenizers")


class OutOfTime(BaseException):
    """The time box of a part is over. Not an Exception, so that nothing on the way catches it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results.json and table.md")
    parser.add_argument("--device", default="cuda", help="as PyTorch names it")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    parser.add_argument("--part", action="append", choices=BOXES, help="only this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0, help="all time boxes together, at most")
    given = parser.parse_args(arguments)
    for path in (ROOT, ROOT / "src"):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from scripts.gpu import pydantic_stand_in

    stand_in = pydantic_stand_in.install()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: PyTorch sees none. On a CPU: --device cpu --tiny", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32, also in the patch embedding
    from scripts.gpu import Setting

    results = {"machine": machine(torch, given.device, stand_in), "tiny": given.tiny, "parts": {}}
    scale = min(1.0, (60 * given.minutes - 20) / sum(BOXES.values()))
    chosen = given.part or list(BOXES)
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(torch.device(given.device), given.tiny, Path(folder))
            results["parts"][name] = part = {"rows": [], "finished": False, "box_seconds": BOXES[name] * scale}
            run_part(name, setting, part, lambda: write(given.out, results))
    return int(not all(part["finished"] and not failed(part) for part in results["parts"].values()))


def machine(torch: Any, device: str, stand_in: bool) -> dict[str, Any]:
    """Name and versions of what is measured on."""
    cuda = device.startswith("cuda")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(0) if cuda else platform.machine(),
        "memory_bytes": torch.cuda.mem_get_info(0)[1] if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "pydantic_stand_in": stand_in,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run_part(name: str, setting: Any, part: dict[str, Any], save: Any) -> None:
    """Run a part row by row until it ends, fails or its time is over."""
    started = time.perf_counter()
    print(f"{name}: at most {part['box_seconds']:.0f} s", flush=True)
    try:
        with time_box(part["box_seconds"]):
            for row in importlib.import_module(f"scripts.gpu.{name}").rows(setting):
                row["at_seconds"] = round(time.perf_counter() - started, 1)
                part["rows"].append(row)
                save()
                print(f"  {mark(row['ok'])} {row['case']}: {row['summary']}", flush=True)
        part["finished"] = True
    except OutOfTime:
        part["stopped"] = f"its {part['box_seconds']:.0f} s were over"
    except Exception:  # noqa: BLE001  # a part that fails must not cost the others their measurement
        part["stopped"] = traceback.format_exc()
        print(part["stopped"], file=sys.stderr, flush=True)
    part["seconds"] = round(time.perf_counter() - started, 1)
    save()


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block when the time is over."""

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failed(part: dict[str, Any]) -> bool:
    return any(row["ok"] is False for row in part["rows"])


def mark(ok: bool | None) -> str:
    """The verdict of a row; measurements have none."""
    return {True: "ok", False: "FAILED", None: "measured"}[ok]


def write(out: Path, results: dict[str, Any]) -> None:
    """`results.json` and `table.md`, each complete or not at all."""
    from benchmarks.tables import pipe_table

    from vitos.data.files import write_json_atomic, write_text_atomic

    out.mkdir(parents=True, exist_ok=True)
    about = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    cells = []
    for name, part in results["parts"].items():
        cells += [(name, row["case"], mark(row["ok"]), row["summary"]) for row in part["rows"]]
        if "stopped" in part:
            cells.append((name, "–", "STOPPED", part["stopped"].strip().split("\n")[-1].replace("|", "/")))
    lines = [
        "# GPU check",
        "",
        f"Written by `python scripts/gpu_check.py` on {about['date']}, {about['device']}, CUDA {about['cuda']}, "
        f"{versions}{', sizes of a test' if results['tiny'] else ''}.",
        "",
        *pipe_table(("part", "case", "verdict", "figures"), cells, left=4),
    ]
    write_json_atomic(out / "results.json", json.loads(json.dumps(results, default=str)))
    write_text_atomic(out / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
