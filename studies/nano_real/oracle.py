"""What better boxes would give, by the model's own keep rule and by the old one: `python studies/nano_real/oracle.py`.

    python studies/nano_real/oracle.py                                              # the base, nano-real
    python studies/nano_real/oracle.py runs/nano-real-0/model runs/nano-real-1/model runs/nano-real-2/model

Until version 0.2 the control `oracle` ignored the margin and the smallest number of tokens of the keep rule: gold
boxes kept fewer tokens than the model's own boxes of the same size would. This asks each model, its seeds, only for
its own boxes and for both oracles, on the test questions; answers are kept in `--out`, so it can be stopped. Prints
accuracies and differences with intervals over seeds and questions.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from vitos.core.sparsify import KeepRule
from vitos.eval.bench import read_sets
from vitos.eval.conditions import CONTROL, LOCALIZE, OWN_BOXES, Settings
from vitos.eval.controls import ORACLE
from vitos.eval.figures import columns_of
from vitos.eval.run import AskedModel, run_models
from vitos.eval.seeds import nested_bootstrap
from vitos.eval.store import EvalFolder
from vitos.policy.vlm import SparseVLM

SETS = ("brain_tumor_mri", "blood_cells", "nuclei")
GOLD = f"{CONTROL}{ORACLE}"
CONDITIONS = (LOCALIZE, OWN_BOXES, GOLD)


def old_rule(path: str) -> SparseVLM:
    """The model with a keep rule without margin: its oracle is the old one."""
    return SparseVLM.from_pretrained(path).with_spec(keep=KeepRule())


def scores(folder: EvalFolder, models: list[str], condition: str, key: str = "correct") -> np.ndarray:
    """Shape (models, questions)."""
    questions = {name: folder.questions(name) for name in folder.manifest()["benchmarks"]}
    found = [columns_of(folder, model, questions, CONDITIONS)[condition] for model in models]
    return np.stack([np.concatenate([getattr(own[name], key) for name in questions]) for own in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["nano-real"])
    parser.add_argument("--out", type=Path, default=Path("runs/nano-real-oracle"))
    parser.add_argument("--limit", type=int, help="number of questions of each set, from its start")
    args = parser.parse_args()
    names = [f"seed{i}" for i in range(len(args.models))]
    asked = [
        AskedModel(name=f"{name} {rule}", path=path, conditions=CONDITIONS, load=partial(load, path))
        for name, path in zip(names, args.models, strict=True)
        for rule, load in (("own rule", SparseVLM.from_pretrained), ("old rule", old_rule))
    ]
    settings = Settings(batch_size=48, max_localization_tokens=256, max_reasoning_tokens=32)
    sets = read_sets([f"{name}=../shared/data/{name}/test.json" for name in SETS], [], args.limit)
    run_models(asked, sets, settings, args.out)
    folder = EvalFolder(args.out)
    own, old = ([f"{name} {rule}" for name in names] for rule in ("own rule", "old rule"))
    sparse = scores(folder, own, OWN_BOXES)
    print("| tokens of the gold boxes | kept | accuracy | minus own boxes, points | 95 % interval | visible |")
    print("| --- " * 6 + "|")
    for title, models in (("by the model's own rule", own), ("without margin, as before", old)):
        gold = scores(folder, models, GOLD)
        gap = nested_bootstrap(100 * (gold - sparse))
        kept = np.nanmean(scores(folder, models, GOLD, "kept"))
        told = f"{gap.estimate:+.1f} | {gap.low:+.1f} to {gap.high:+.1f} | {gap.visible:.1f}"
        print(f"| {title} | {kept:.3f} | {np.nanmean(gold):.3f} | {told} |")


if __name__ == "__main__":
    main()
