"""`python -m benchmarks train`: what one training step costs, beside the same step unshared and beside TRL.

The ways run in processes of their own (`train_worker.py`), which take turns on the same cores, so that a step and the
steps it is compared with are neighbours in time. Ratios are medians of such pairs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table

from benchmarks.tables import pipe_table
from benchmarks.train_shapes import SHAPES
from benchmarks.train_turns import STEP, STEPS_OF_A_TURN, Job, Way
from vitos.data.files import write_json_atomic, write_text_atomic

WAYS: tuple[Way, ...] = ("shared", "own prompts", "unshared", "trl")
STAGES = ("sample", "score", "backward")
RESULTS, TABLE = "results.json", "table.md"
HEADER = (
    "model",
    "G = K",
    "step",
    "prompt tokens",
    "s/step",
    *STAGES,
    "other",
    "CPU s",
    "ms/completion token",
    "peak MiB",
    "time ÷ shared",
)
# Columns of the screen's table by their place in `HEADER`, with short names.
_ON_SCREEN = {
    HEADER.index(name): short
    for name, short in {
        "model": "model",
        "G = K": "G",
        "step": "step",
        "s/step": "s/step",
        "sample": "sample",
        "score": "score",
        "backward": "backw.",
        "peak MiB": "MiB",
        "time ÷ shared": "÷ shared",
    }.items()
}


@dataclass(frozen=True, slots=True)
class TrainBench:
    """What is measured.

    Attributes:
        shapes: names of `SHAPES`.
        groups: values of G = K.
        compare_to: the largest G = K at which the other ways run, too.
        questions: of a step.
        tokens: of every completion.
        repeats: measured steps of each way, behind a turn to warm up.
        micro_batch_tokens: padded tokens of one forward pass.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    groups: tuple[int, ...] = (2, 4, 8, 16)
    compare_to: int = 8
    questions: int = 1
    tokens: int = 16
    repeats: int = 5
    micro_batch_tokens: int = 16_384

    def __post_init__(self) -> None:
        if unknown := [name for name in self.shapes if name not in SHAPES]:
            raise ValueError(f"there is no shape {unknown[0]!r}; take {', '.join(SHAPES)}")
        if min((*self.groups, 2)) < 2 or min(self.questions, self.tokens, self.repeats) < 1:
            raise ValueError("groups must be >= 2; questions, tokens and repeats >= 1")


def trl_problem() -> str | None:
    """Why TRL cannot be measured here, or None."""
    how = 'pip install "vitos[bench]"'
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return f"trl not installed: {how}"
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if major == 1 and minor >= 16 else f"trl {version} is not >= 1.16, < 2: {how}"


def measure(bench: TrainBench, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Run all steps; figures by shape, group and way (see `docs/training.md`).

    Args:
        progress: called with the number of steps made and their total.

    Raises:
        RuntimeError: if a process fails, with the end of what it said.
    """
    missing = trl_problem()
    every = [way for way in WAYS if way != "trl" or missing is None]
    load = os.getloadavg()[0]
    turns = sum(len(every) if group <= bench.compare_to else 1 for group in bench.groups)
    total = len(bench.shapes) * turns * (bench.repeats + 1)
    rows: list[dict[str, Any]] = []
    done = 0
    for shape in bench.shapes:
        for group in bench.groups:
            ways = every if group <= bench.compare_to else every[:1]
            steps: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
            for way, figures in _turns(bench, shape, group, ways):
                steps[way].append(figures)
                done += 1
                progress(done, total)
            rows += [
                {"shape": shape, "group": group, "way": way, **summarize(steps[way][1:], steps["shared"][1:])}
                for way in ways
            ]
            if missing is not None and len(ways) > 1:
                rows.append({"shape": shape, "group": group, "way": "trl", "missing": missing})
    return {
        "settings": asdict(bench),
        "machine": _machine(load),
        "rows": rows,
        "exponents": _exponents(rows),
    }


def summarize(steps: Sequence[Mapping[str, float]], shared: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of one way's steps, and of the ratios to its neighbours among the `shared` ones."""

    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    def ratios(name: str) -> list[float]:
        return [step[name] / other[name] for step, other in zip(steps, shared, strict=True)]

    stages = {name: median([step[name] for step in steps]) for name in STAGES}
    seconds = median([step["total"] for step in steps])
    return {
        "prompt_tokens": int(steps[0]["prompt_tokens"]),
        "completion_tokens": int(steps[0]["completion_tokens"]),
        "seconds": seconds,
        **stages,
        "other": median([step["total"] - sum(step[name] for name in STAGES) for step in steps]),
        "cpu_seconds": median([step["cpu"] for step in steps]),
        "seconds_per_completion_token": seconds / steps[0]["completion_tokens"],
        "peak_mib": max(step["peak_mib"] for step in steps),
        "time_ratio": median(ratios("total")),
        "time_ratio_range": [min(ratios("total")), max(ratios("total"))],
        "prompt_token_ratio": median(ratios("prompt_tokens")),
        "steps": list(steps),
    }


def _exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """x of seconds ~ G^x by shape and way: the slope of the least-squares line through the logarithms."""
    out: dict[str, dict[str, float]] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for way in WAYS:
            found = [r for r in rows if (r["shape"], r["way"]) == (shape, way) and "seconds" in r]
            if len(found) >= 2:
                logs = np.log([[row["group"], row["seconds"]] for row in found])
                out.setdefault(shape, {})[way] = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return out


def _machine(load: float) -> dict[str, Any]:
    packages = ("torch", "transformers", "trl")
    versions = {name: importlib.metadata.version(name) for name in packages if name != "trl" or not trl_problem()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "versions": versions,
    }


# --- processes ------------------------------------------------------------------------------------------------------


def _turns(bench: TrainBench, shape: str, group: int, ways: Sequence[Way]) -> Iterator[tuple[Way, dict[str, float]]]:
    """Steps of all ways in turns; who begins changes with every round."""
    with ExitStack() as stack:
        folder, steps = Path(stack.enter_context(tempfile.TemporaryDirectory())), STEPS_OF_A_TURN * (bench.repeats + 1)
        workers = {
            way: stack.enter_context(
                _worker(Job(shape, way, group, bench.questions, bench.tokens, bench.micro_batch_tokens, steps), folder)
            )
            for way in ways
        }
        for turn in range(bench.repeats + 1):
            for place in range(len(ways)):
                way = ways[(turn + place) % len(ways)]
                yield way, workers[way]()


@contextmanager
def _worker(job: Job, folder: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that makes one step for every call."""
    path, errors = folder / f"{job.way}.json", folder / f"{job.way}.txt"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.train_worker", str(path)]
    with errors.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def step() -> dict[str, float]:
        try:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # said below
        for line in process.stdout or ():
            if line.startswith(STEP):
                return cast(dict[str, float], json.loads(line.removeprefix(STEP)))
        said = errors.read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"the {job.way} step of {job.shape} with G = K = {job.group} failed:\n{said}")

    try:
        yield step
    finally:
        process.kill()
        process.communicate()


# --- tables ---------------------------------------------------------------------------------------------------------


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, in the order of `HEADER`."""
    start = [row["shape"], str(row["group"]), row["way"]]
    if "missing" in row:
        return [*start, row["missing"], *[""] * (len(HEADER) - 4)]
    low, high = row["time_ratio_range"]
    return [
        *start,
        f"{row['prompt_tokens']:,}",
        f"{row['seconds']:.3f}",
        *(f"{row[name]:.3f}" for name in (*STAGES, "other")),
        f"{row['cpu_seconds']:.3f}",
        f"{1000 * row['seconds_per_completion_token']:.2f}",
        f"{row['peak_mib']:.0f}",
        f"{row['time_ratio']:.2f} ({low:.2f}–{high:.2f})",
    ]


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """Exponents, and the ratios at the largest common group, in words."""
    lines = [
        f"{shape}: seconds grow as " + ", ".join(f"G^{value:.2f} ({way})" for way, value in values.items())
        for shape, values in results["exponents"].items()
    ]
    lines += [
        f"{row['shape']}, G = K = {row['group']}: {row['way']} runs {row['prompt_token_ratio']:.1f} times the prompt "
        f"tokens and takes {row['time_ratio']:.2f} times the time per completion token"
        for row in results["rows"]
        if row["way"] != "shared" and "seconds" in row
    ]
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The table and what follows from it."""
    lines = pipe_table(HEADER, map(cells, results["rows"]), left=3)
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    told = (
        f"{machine['device']}, {machine['threads']} threads on {machine['cores']} cores, load before "
        f"{machine['load_before']}; {versions}. {settings['questions']} question(s) a step, completions of "
        f"{settings['tokens']} tokens, {settings['repeats']} steps of each kind in turns; medians (range of pairs)."
    )
    return "\n".join([*lines, "", told, "", *[f"- {line}" for line in conclusions(results)]]) + "\n"


def render(results: Mapping[str, Any]) -> Table:
    """The table for the screen: what fits 80 columns."""
    table = Table(box=None, pad_edge=False)
    for place, name in _ON_SCREEN.items():
        table.add_column(name, justify="left" if HEADER[place] in ("model", "step") else "right", no_wrap=True)
    for row in results["rows"]:
        made = cells(row)
        table.add_row(*(made[place].split(" (")[0] for place in _ON_SCREEN))
    return table


def write(results: Mapping[str, Any], folder: Path) -> None:
    """`results.json` and `table.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / RESULTS, results)
    write_text_atomic(folder / TABLE, markdown(results))
