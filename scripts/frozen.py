"""Prove that a change leaves every answer and every figure as it was.

    python scripts/frozen.py compare HEAD~1          # that commit against the working tree
    python scripts/frozen.py record OUT              # the working tree alone
    python scripts/frozen.py diff OUT_A OUT_B        # two records

`record` runs the jobs of `JOBS` with the code of one checkout: the quickstart, short trainings under the other plans,
evaluations by every plan, a bench on phantoms, and nano-real on the three sets of `../shared/data`. It keeps the text
of every answer and every figure in full precision; only times, paths and versions are left out. A job that needs what
the machine lacks is named and left out. `compare` takes about 15 minutes a side and keeps the record of a
commit in `runs/frozen`, so the second comparison with it costs one side only. Every job runs in one thread: with two,
the same code gives gradients that differ in the last bits.

Both records must be made on one machine with the same packages: floating-point sums differ between processors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETS = ("brain_tumor_mri", "blood_cells", "nuclei")
# Figures that say how long, where or by whom; everything else must be equal.
UNSTABLE = {
    "seconds",
    "seconds_by_stage",
    "vitos_version",
    "command",
    "checkpoint",
    "base",
    "dataset",
    "models",
    "path",
}
RUNTIME = ("seconds/", "train_runtime", "train_samples_per_second", "train_steps_per_second", "memory")
SHOWN = 20

Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Commands of the command line, run in one work folder, and what reads their results.

    Attributes:
        commands: arguments of `vitos`; `{shared}` is the folder of shared data.
        read: texts and figures, given the work folder.
        needs: paths under the shared folder without which the job is left out.
    """

    commands: tuple[str, ...]
    read: Callable[[Path], Json]
    needs: tuple[str, ...] = ()


# --- jobs -----------------------------------------------------------------------------------------------------------


def _evaluation(folder: str) -> Callable[[Path], Json]:
    return lambda work: {
        "texts": _case_texts(work / folder),
        "figures": _stable(_read(work / folder / "results.json")),
    }


def _training(folder: str) -> Callable[[Path], Json]:
    def read(work: Path) -> Json:
        rows = [json.loads(line) for line in (work / folder / "metrics.jsonl").read_text().splitlines()]
        found = {"metrics": [{k: v for k, v in row.items() if not k.startswith(RUNTIME)} for row in rows]}
        return found | (_evaluation(folder)(work) if (work / folder / "results.json").is_file() else {})

    return read


def _bench(folder: str) -> Callable[[Path], Json]:
    def read(work: Path) -> Json:
        answers = sorted((work / folder / "answers").rglob("*.jsonl"))
        rows = [json.loads(line) for file in answers for line in file.read_text().splitlines()]
        texts = {f"{r['condition']} {r['id']}": {k: r.get(k) for k in ("text", "boxes", "tokens")} for r in rows}
        return {"texts": texts, "figures": _stable(_read(work / folder / "results.json"))}

    return read


def _short(plan: str, *changes: str) -> str:
    small = (
        "train.localization_steps=2",
        "train.reasoning_steps=2",
        "train.questions_per_step=8",
        "data.limit_eval=100",
        "evaluate.bootstrap_samples=500",
        f"sparsify.plan={plan}",
        f"output_dir=runs/short-{plan}",
        *changes,
    )
    return "train {root}/recipes/quickstart.yaml " + " ".join(f"--set {change}" for change in small)


_EVAL = "eval runs/quickstart/model --data runs/phantom/test.json --base nano --limit 200"
_REAL = " ".join(f"--data {{shared}}/data/{name}/test.json" for name in SETS)

JOBS: dict[str, Job] = {
    "quickstart": Job(
        (
            "data phantom runs/phantom --train 2000 --val 256 --test 800 --seed 0",
            "train {root}/recipes/quickstart.yaml",
        ),
        _training("runs/quickstart"),
    ),
    "eval": Job((f"{_EVAL} --budget 0.25 --out runs/eval",), _evaluation("runs/eval")),
    "eval-gather": Job(
        (f"{_EVAL} --plan gather --budget 0.25 --out runs/eval-gather",), _evaluation("runs/eval-gather")
    ),
    "eval-coarse": Job((f"{_EVAL} --plan coarse --out runs/eval-coarse",), _evaluation("runs/eval-coarse")),
    "eval-crop": Job((f"{_EVAL} --plan crop --out runs/eval-crop",), _evaluation("runs/eval-crop")),
    "bench": Job(
        (
            "bench run trained=runs/quickstart/model nano --data runs/phantom/test.json --out runs/bench "
            "--budget 0.5 --budget 0.1 --limit 60",
        ),
        _bench("runs/bench"),
    ),
    "train-gather": Job((_short("gather"),), _training("runs/short-gather")),
    "train-coarse": Job((_short("coarse", "evaluate.budgets=[]"),), _training("runs/short-coarse")),
    "train-joint": Job(
        (
            _short(
                "two_pass",
                "train.schedule=joint",
                "train.localization_kl=0",
                *(f"train.stage1_{name}=null" for name in ("num_localizations", "num_reasonings", "learning_rate")),
            ),
        ),
        _training("runs/short-two_pass"),
    ),
    "nano-real": Job(
        (f"eval nano-real {_REAL} --out runs/real-eval",),
        _evaluation("runs/real-eval"),
        needs=("models/dinov2-small", *(f"data/{name}/test.json" for name in SETS)),
    ),
}


# --- recording ------------------------------------------------------------------------------------------------------


def record(checkout: Path, out: Path, names: list[str]) -> None:
    """Run jobs with the code of `checkout`; each leaves `out/<job>.json`, and is skipped where that is there."""
    shared, work = ROOT.parent / "shared", out / "work"
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout / "src"),
        "VITOS_DINOV2": str(shared / "models" / "dinov2-small"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # several threads add up gradients in an order that differs from run to run
    }
    for name in names:
        job, file = JOBS[name], out / f"{name}.json"
        if file.is_file():
            continue
        if lacking := [need for need in job.needs if not (shared / need).exists()]:
            print(f"{name}: left out, there is no ../shared/{lacking[0]}", flush=True)
            continue
        for command in job.commands:
            words = [word.format(root=checkout, shared=shared) for word in command.split()]
            print(f"{name}: vitos {' '.join(words)}", flush=True)
            log = out / f"{name}.log"
            with log.open("a") as stream:
                done = subprocess.run(
                    [sys.executable, "-m", "vitos", *words], cwd=work, env=environment, stdout=stream, stderr=stream
                )
            if done.returncode:
                raise SystemExit(f"{name} failed with exit code {done.returncode}; see {log}")
        file.write_text(json.dumps(job.read(work), sort_keys=True, indent=0))


def _case_texts(folder: Path) -> Json:
    """Text, boxes and kept tokens of every answer, by data set, question and condition."""
    texts: Json = {}
    for line in (folder / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        for condition, row in case["conditions"].items():
            key = f"{Path(case['dataset']).parent.name} {case['id']} {condition}"
            texts[key] = {name: row.get(name) for name in ("text", "correct", "boxes", "kept", "fallback")}
    return texts


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_set_name(k): _stable(v) for k, v in value.items() if k not in UNSTABLE}
    return [_stable(part) for part in value] if isinstance(value, list) else value


def _set_name(key: str) -> str:
    """A data set's name without the folder that it lies in."""
    return Path(key).parent.name if key.endswith(".json") else key


def _read(file: Path) -> Json:
    loaded: Json = json.loads(file.read_text())
    return loaded


# --- comparing ------------------------------------------------------------------------------------------------------


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Every place where two records differ; what only the second has is no difference."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a:
            if key not in b:
                yield f"{where}/{key}: missing"
            else:
                yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif a != b and not (a != a and b != b):  # NaN equals NaN
        yield f"{where}: {a!r} != {b!r}"


def diff(first: Path, second: Path) -> bool:
    """Print where two records differ; whether they are equal."""
    equal = True
    for name in JOBS:
        files = [folder / f"{name}.json" for folder in (first, second)]
        if not all(file.is_file() for file in files):
            print(f"{name}: not compared, {'; '.join(str(f) for f in files if not f.is_file())} is missing")
            continue
        a, b = map(_read, files)
        found = list(differences(a, b))
        count = f"{len(a.get('texts', {}))} answers, {_leaves(a) - _leaves(a.get('texts', {}))} figures"
        print(f"{name}: {'equal' if not found else f'{len(found)} differences'} ({count})")
        for line in found[:SHOWN]:
            print(f"    {line[:300]}")
        equal = equal and not found
    return equal


def _leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_leaves, value.values()))
    return sum(map(_leaves, value)) if isinstance(value, list) else 1


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def compare(revision: str, names: list[str]) -> bool:
    """Record a commit and the working tree, and compare them."""
    commit = _git("rev-parse", "--short", revision)
    kept = ROOT / "runs" / "frozen" / commit
    with tempfile.TemporaryDirectory() as folder:
        if any(not (kept / f"{name}.json").is_file() for name in names):
            checkout = Path(folder) / "checkout"
            _git("worktree", "add", "--detach", str(checkout), commit)
            try:
                record(checkout, kept, names)
            finally:
                _git("worktree", "remove", "--force", str(checkout))
        now = Path(folder) / "now"
        record(ROOT, now, names)
        return diff(kept, now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, arguments in {"record": ("out",), "diff": ("first", "second"), "compare": ("revision",)}.items():
        chosen = verbs.add_parser(verb)
        for argument in arguments:
            chosen.add_argument(argument)
        chosen.add_argument("--job", action="append", choices=list(JOBS), help="by default all")
    given = parser.parse_args()
    names = given.job or list(JOBS)
    if given.verb == "record":
        record(ROOT, Path(given.out).resolve(), names)
    elif not (
        compare(given.revision, names) if given.verb == "compare" else diff(Path(given.first), Path(given.second))
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
