"""Volumes and dates: `python studies/volumes/run.py --model runs/nano-volumes --out studies/volumes`.

Asks a model about phantoms of several images (`vitos/data/phantom_volumes.py`), each seed its own test set: from all
tokens, from the tokens of its own boxes, and from as many random ones. Besides accuracy it says which slices the boxes
found: precision and recall over the slices of a question, mean over the questions. Questions whose boxes could not be
read count as having found no slice.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vitos.core.geometry import Box
from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.data.phantom_volumes import write_volumes
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.statistics import Interval, bootstrap_mean, paired_bootstrap_difference
from vitos.policy.vlm import SparseVLM

CONDITIONS = {"dense": "all tokens", "sparse": "its own boxes", "random": "as many random tokens"}


def slices_found(case: Mapping[str, Any]) -> tuple[float, float] | None:
    """Precision and recall of the images in which a case has boxes; None without gold boxes.

    >>> gold, found = [[0, 0, 1, 1], {"image": 2, "box": [0, 0, 1, 1]}], [{"image": 2, "box": [0, 0, 0.5, 1]}]
    >>> slices_found({"gold_boxes": gold, "conditions": {"localization": {"boxes": found}}})
    (1.0, 0.5)
    """
    gold = {Box.from_json(box).image for box in case["gold_boxes"]}
    found = {Box.from_json(box).image for box in case["conditions"]["localization"]["boxes"]}
    if not gold:
        return None
    hit = len(gold & found)
    return (hit / len(found) if found else 0.0), hit / len(gold)


def figures(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All figures of some cases: each with the ends of its 95 % interval."""
    right = {name: [float(case["conditions"][name]["correct"]) for case in cases] for name in CONDITIONS}
    found = [pair for pair in map(slices_found, cases) if pair is not None]
    kept = [case["conditions"]["sparse"]["kept_ratio"] for case in cases]
    return {
        "questions": len(cases),
        "accuracy": {name: _ends(bootstrap_mean(values)) for name, values in right.items()},
        "sparse_minus_dense": _ends(paired_bootstrap_difference(right["sparse"], right["dense"])),
        "sparse_minus_random": _ends(paired_bootstrap_difference(right["sparse"], right["random"])),
        "slice_precision": _ends(bootstrap_mean([precision for precision, _ in found])),
        "slice_recall": _ends(bootstrap_mean([recall for _, recall in found])),
        "kept_ratio": mean(kept),
        "fallback_rate": mean(float(case["conditions"]["sparse"]["fallback"]) for case in cases),
    }


def _ends(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.estimate, interval.low, interval.high)]


def measure(policy: SparseVLM, seed: int, questions: int, slices: int) -> dict[str, Any]:
    """Figures of one test set: of all questions, and by template."""
    with TemporaryDirectory() as folder:
        records = read_records(write_volumes(Path(folder), "test", questions, seed, slices=slices))
        settings = Settings(max_localization_tokens=96, max_reasoning_tokens=32, batch_size=8, seed=seed)
        cases = cases_in_memory(policy, records, settings)
    templates = dict.fromkeys(case["template"] for case in cases)
    by_template = {name: figures([case for case in cases if case["template"] == name]) for name in templates}
    return {"all": figures(cases), **by_template}


def markdown(results: Mapping[str, Any]) -> str:
    """The table of all seeds."""
    lines = [
        f"Made by `{results['command']}`. In brackets: 95 % intervals over the questions of one test set.",
        "",
        "| seed | questions | " + " | ".join(CONDITIONS.values()) + " | slices: precision | recall | tokens kept |",
        "| :-- | :-- |" + " --: |" * 6,
    ]
    for seed, groups in results["seeds"].items():
        for name, row in groups.items():
            cells = [*(row["accuracy"][c] for c in CONDITIONS), row["slice_precision"], row["slice_recall"]]
            shown = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in cells]
            lines.append(f"| {seed} | {name} | {' | '.join(shown)} | {row['kept_ratio']:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, such as that of scripts/make_nano_volumes.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=150, help="questions of each test set")
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = SparseVLM.from_pretrained(args.model, device="cpu")
    command = f"python studies/volumes/run.py --model {args.model} --questions {args.questions} --slices {args.slices}"
    results: dict[str, Any] = {"command": command, "seeds": {}}
    for seed in args.seeds:
        results["seeds"][str(seed)] = measure(policy, seed, args.questions, args.slices)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out / "results.json", results)
    write_text_atomic(args.out / "table.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
