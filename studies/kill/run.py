"""Kill -9 at random moments of one run, then compare with a run that nobody touched: `python studies/kill/run.py`.

A tiny run of both stages (nano, 8 phantoms, a checkpoint at every update) is made once without interruption. The same
run is then killed at `--kills` moments, each drawn from the seed: an update, and a share of an update's time behind
it, so that some kills hit a rollout, some a backward pass, some the writing of a checkpoint, and some the start. After
each kill it goes on with `--resume`. In the end every weight, the optimizer's state, the schedule, the random state
and the series of figures must be those of the first run: bit for bit in one process, to float tolerance in several
(`--processes 2`, DDP over gloo, all processes killed at once).

Writes `log.jsonl`, a line a kill (`half_written`: staged folders that lay there then, also of earlier kills), and
`results.json` beside this file, under `log-2.jsonl` and `results-2.json` for two processes. Exits with 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics
from vitos.rl.checkpoint import all_checkpoints, is_complete, staging_path

HERE = Path(__file__).parent
POLL = 0.01  # seconds; what the moments are exact to
RECIPE = """
name: kill
output_dir: {run}
seed: 3
data: {{train: {data}}}
train:
  localization_steps: {half}
  reasoning_steps: {half}
  questions_per_step: 2
  num_localizations: 2
  num_reasonings: 2
  max_localization_tokens: 12
  max_reasoning_tokens: 8
  temperature: 1.4
  learning_rate: 1.0e-3
  lr_scheduler_type: linear
  skip_equal_outcomes: false
  save_steps: 1
  save_total_limit: 2
  log_samples_steps: 0
trainer: {{use_cpu: true, disable_tqdm: true}}
"""


def start(folder: Path, processes: int, resume: bool) -> list[subprocess.Popen[bytes]]:
    """The run in processes of its own, one thread each."""
    command = [sys.executable, "-m", "vitos", "train", str(folder / "recipe.yaml"), *(["--resume"] if resume else [])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = []
    for rank in range(processes):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port}
        several = more | {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"} if processes > 1 else {}
        with (folder / f"said-{rank}.txt").open("a") as said:
            started.append(subprocess.Popen(command, env=environment | several, stdout=said, stderr=said))
    return started


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    """Kill -9, all at once."""
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
    for process in running:
        process.wait()


def finish(running: list[subprocess.Popen[bytes]], folder: Path) -> None:
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"the run ended with {codes}:\n{(folder / 'said-0.txt').read_text()[-3000:]}")


def prepare(base: Path, name: str, updates: int) -> Path:
    folder = base / name
    folder.mkdir(parents=True)
    text = RECIPE.format(run=folder / "run", data=base / "data" / "train.json", half=updates // 2)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


def updates_done(run: Path) -> int:
    """Updates whose figures are written, a line each; the last one's checkpoint may be missing."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def uninterrupted(base: Path, updates: int, processes: int) -> tuple[Path, float, float]:
    """Run folder, seconds until the first update is done, seconds of one update."""
    folder = prepare(base, "whole", updates)
    began, running, first = time.monotonic(), start(folder, processes, resume=False), 0.0
    while any(process.poll() is None for process in running):
        if not first and updates_done(folder / "run"):
            first = time.monotonic() - began
        time.sleep(POLL)
    finish(running, folder)
    return folder / "run", first, (time.monotonic() - began - first) / (updates - 1)


def interrupted(
    base: Path, moments: list[tuple[int, float]], seconds: tuple[float, float], updates: int, processes: int
) -> tuple[Path, list[dict[str, Any]]]:
    """Run folder and a line for every kill."""
    folder, lines = prepare(base, "killed", updates), []
    run, (startup, update) = folder / "run", seconds
    for number, (target, share) in enumerate(moments, start=1):
        began, running = time.monotonic(), start(folder, processes, resume=number > 1)
        before = updates_done(run)
        # Where the figures of that update are there already, the moment lies in the start.
        wait = share * (startup if before >= target else update)
        while updates_done(run) < target and all(process.poll() is None for process in running):
            time.sleep(POLL)
        # Should the machine have become faster: not later than the figures of the next update, and before the end.
        limit = min(target + 1 if before < target else before, updates - 1)
        end, moved = time.monotonic() + wait, False
        while time.monotonic() < end and not (moved and updates_done(run) > limit):
            moved |= updates_done(run) != before  # a resumed run first drops rows behind its checkpoint
            time.sleep(POLL)
        if any(process.poll() is not None for process in running):
            stop(running)
            raise SystemExit(f"the run ended before kill {number}:\n{(folder / 'said-0.txt').read_text()[-3000:]}")
        stop(running)
        complete = [path.name for path in all_checkpoints(run) if is_complete(path)]
        line = {
            "kill": number,
            "behind_update": target,
            "seconds_alive": round(time.monotonic() - began, 1),
            "updates_done": updates_done(run),
            "last_complete": complete[-1] if complete else None,
            "half_written": sorted(p.name for p in run.glob(staging_path(Path("*")).name)) if run.is_dir() else [],
        }
        print(json.dumps(line), flush=True)
        lines.append(line)
    finish(start(folder, processes, resume=bool(moments)), folder)
    return run, lines


# --- comparison -----------------------------------------------------------------------------------------------------


def state_of(run: Path, updates: int) -> dict[str, Any]:
    """Everything of a finished run that could differ: tensors and plain values by name."""
    state: dict[str, Any] = {}
    last = run / f"checkpoint-{updates}"
    for folder in (run / "stage1", run / "model", last):
        state |= {f"{folder.name}/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    for name in ("optimizer.pt", "scheduler.pt"):
        state |= flat(name, torch.load(last / name, weights_only=True))
    for path in sorted(last.glob("rng_state*.pth")):
        state[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for row in read_metrics(run / "metrics.jsonl"):
        state |= {f"metrics/{row['step']}/{k}": v for k, v in row.items() if not timing(k)}
    return state


def timing(key: str) -> bool:
    return key.startswith("seconds/") or key == "total_flos"


def flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(f"{name}/{key}", inner).items()}
    return {name: value}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def distance(a: dict[str, Any], b: dict[str, Any], start: dict[str, torch.Tensor]) -> float:
    """Norm of the final weights' difference over that of what training changed."""
    names = [name for name in a if name.startswith("model/")]
    apart = sum(float((a[n] - b[n]).double().square().sum()) for n in names)
    moved = sum(float((a[n] - start[n.removeprefix("model/")]).double().square().sum()) for n in names)
    return float((apart / moved) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=12, help="of both stages together")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/kill"), help="folder for both runs; it is emptied")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    base = args.work.resolve()
    write_phantoms(base / "data", "train", 8)
    whole, startup, update = uninterrupted(base, args.updates, args.processes)
    print(f"uninterrupted: first update after {startup:.1f} s, then {update:.2f} s each", flush=True)
    draw = np.random.default_rng(args.seed)
    targets = sorted(draw.integers(0, args.updates - 1, args.kills).tolist())
    moments = list(zip(targets, draw.random(args.kills).tolist(), strict=True))
    killed, lines = interrupted(base, moments, (startup, update), args.updates, args.processes)

    expected, found = state_of(whole, args.updates), state_of(killed, args.updates)
    differing = sorted(n for n in expected.keys() | found.keys() if not same(expected.get(n), found.get(n)))
    nano = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    results = {
        "kills": len(lines),
        "processes": args.processes,
        "updates": args.updates,
        "seed": args.seed,
        "compared": len(expected),
        "differing": differing,
        "relative_distance_of_weights": distance(expected, found, nano),
    }
    suffix = "" if args.processes == 1 else f"-{args.processes}"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / f"log{suffix}.jsonl").write_text(text, encoding="utf-8")
    (HERE / f"results{suffix}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    good = not differing if args.processes == 1 else results["relative_distance_of_weights"] < 1e-3
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
