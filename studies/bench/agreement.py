"""Our selectors against what published code chooses on fixed inputs: `python studies/bench/agreement.py [folder]`.

The folder, by default `../shared/data/selector_reference`, holds the inputs, and what each implementation chose
(its README explains both). Prints the table of `agreement.md`; `--write` replaces that file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitos.backbones.attention import Attention
from vitos.core.geometry import BoolArray
from vitos.eval.selectors.base import highest
from vitos.eval.selectors.dart import unlike_pivots
from vitos.eval.selectors.diversity import conditional_kernel, cosines
from vitos.eval.selectors.hiprune import anchored
from vitos.eval.selectors.holov import crop_wise
from vitos.eval.selectors.merging import bipartite_merge
from vitos.eval.selectors.mmtok import coverage_order
from vitos.eval.selectors.prumerge import outliers, outliers_and_steps, summed_merge
from vitos.eval.selectors.pyramiddrop import staged
from vitos.eval.selectors.scope import salient_coverage_order
from vitos.eval.selectors.sparsevlm import raters, recycled_merge
from vitos.eval.selectors.spread import determinant_order, max_min_order
from vitos.eval.selectors.visionzip import equal_weights, visionzip_merge
from vitos.eval.selectors.vispruner import important_and_diverse

HERE = Path(__file__).parent
REFERENCE = HERE.parents[1].parent / "shared/data/selector_reference"
HEADS = (
    "selector",
    "implementation",
    "commit",
    "robust runs",
    "equal sets",
    "equal order",
    "embeddings",
    "other runs",
)

Case = Mapping[str, Tensor]
Run = Mapping[str, Any]


@dataclass
class Found:
    """What our code makes of a run: tokens, in the order of choice where that is compared, and merged embeddings."""

    kept: list[int]
    ordered: bool = False
    owner: list[int] | None = None
    merged: dict[str, Tensor] = field(default_factory=dict)


def found(index: Tensor | np.ndarray, *, ordered: bool = True) -> Found:
    return Found([int(i) for i in index], ordered)


def masked(mask: BoolArray) -> Found:
    return found(np.flatnonzero(mask), ordered=False)


def seen(case: Case, name: str = "attention") -> Attention:
    """Attention of the CLS token, as the backbones give it."""
    keys = case["keys"]
    wide, query = keys.transpose(0, 1).flatten(1), case["cls_query"].flatten()
    logits = torch.cat([case["cls_key"].flatten()[None], wide]) @ query / len(query) ** 0.5
    return Attention(case[name].mean(0), keys, logits.softmax(0)[1:])


# --- one function per method ----------------------------------------------------------------------------------------


def divprune(case: Case, run: Run) -> Found:
    return found(max_min_order(1 - cosines(case["tokens"]))[: run["keep"]])


def cdpruner(case: Case, run: Run) -> Found:
    words = case["text"] * (-1 if run["implementation"].endswith("text negated") else 1)
    unit = torch.nn.functional.normalize
    scores = -(unit(case["tokens"], dim=-1) @ unit(words, dim=-1).mean(0)).numpy()
    return found(determinant_order(conditional_kernel(cosines(case["tokens"]), scores), run["keep"]))


def visionzip(case: Case, run: Run) -> Found:
    mask, matrix = visionzip_merge(seen(case), run["keep"])
    if run["implementation"] == "angelslim":
        matrix = equal_weights(matrix)
    rows = np.searchsorted(np.flatnonzero(mask), run["targets"])
    out = masked(mask)
    if rows.size and rows.max() < len(matrix):
        out.merged["contextual"] = matrix[rows].double() @ case["tokens"]
    return out


def tome(case: Case, run: Run) -> Found:
    places, matrix = bipartite_merge(
        case["tokens"].float(), run["keep"], in_order=run["implementation"] != "lightcompress"
    )
    out = found(places)
    out.owner = (matrix > 0).int().argmax(0).tolist()
    out.merged["merged"] = matrix.double() @ case["tokens"]
    return out


def fastv(case: Case, run: Run) -> Found:
    scores = case["llm_attention"][:, -1].mean(0)[len(case["prefix"]) :][: len(case["tokens"])]
    order = torch.sort(scores, descending=True, stable=True).indices
    return found(order[: run["keep"]])


def pyramiddrop(case: Case, run: Run) -> Found:
    scores = case["llm_attention"][:, -1].mean(0)[len(case["prefix"]) :][: len(case["tokens"])]
    return masked(staged([scores], run["keep"]))


def sparsevlm(case: Case, run: Run) -> Found:
    rows = raters(case["tokens"], case["text"])
    scores = case["llm_attention"].mean(0)[rows].mean(0)[len(case["prefix"]) :][: len(case["tokens"])]
    mask, matrix = recycled_merge(case["tokens"], scores, run["keep"])
    out = masked(highest(scores, run["keep"]))
    if rows.tolist() != run["raters"] or int(mask.sum()) != run["keep"] + run["clusters"]:
        out.kept = []
    if reference := run.get("arrays"):
        made = matrix.double() @ case["tokens"]  # clusters are in the order of the image here
        nearest = torch.cdist(case["reference"], made).argmin(1)
        out.merged[next(iter(reference))] = made[nearest]
    return out


def holov(case: Case, run: Run) -> Found:
    return found(crop_wise(case["tokens"], case["attention"].mean(0), run["keep"], run["num_patches"]))


def vispruner(case: Case, run: Run) -> Found:
    return found(important_and_diverse(case["tokens"], case["attention"].mean(0), run["keep"]), ordered=False)


def hiprune(case: Case, run: Run) -> Found:
    alpha = float(run["implementation"].rsplit(" ", 1)[1])
    cols = {36: 6, 64: 8, 99: 11, 256: 16, 576: 24}[len(case["tokens"])]
    least = int(run["implementation"].startswith("angelslim"))
    layers = (case[name].mean(0) for name in ("shallow_attention", "attention"))
    return masked(anchored(*layers, run["keep"], cols, alpha, least))


def mmtok(case: Case, run: Run) -> Found:
    features = case["keys"].transpose(0, 1).flatten(1)
    temperature = 0.02 if run["implementation"] == "official-llava" else 0.01
    return found(coverage_order(case["tokens"], case["text"], features, run["keep"], temperature))


def scope(case: Case, run: Run) -> Found:
    return found(salient_coverage_order(case["tokens"], case["attention"].mean(0), run["keep"]))


def dart(case: Case, run: Run) -> Found:
    wide = {name: case[name].transpose(0, 1).flatten(1) for name in ("keys", "llm_prefix_keys", "llm_text_keys")}
    words, word_keys = (
        torch.cat(parts)
        for parts in ((case["prefix"], case["text"]), (wide["llm_prefix_keys"], wide["llm_text_keys"]))
    )
    return masked(unlike_pivots(case["tokens"], wide["keys"], words, word_keys, run["keep"]))


def prumerge(case: Case, run: Run) -> Found:
    own = seen(case)
    if run["implementation"].endswith("plus"):
        chosen = outliers_and_steps(own.joint)
    elif run["implementation"].endswith("adaptive"):
        chosen = outliers(own.joint)
    else:
        chosen = torch.sort(own.joint, descending=True, stable=True).indices[: run["keep"]]
    out = found(chosen)
    mask, matrix = summed_merge(own.keys.transpose(0, 1).flatten(1), own.joint, chosen)
    extra = np.setdiff1d(np.flatnonzero(mask), chosen.numpy())  # the row of all others, the last one there
    rows = np.searchsorted(np.flatnonzero(mask), np.concatenate([chosen.numpy(), extra]))
    out.merged["merged"] = matrix[rows].double() @ case["tokens"]
    return out


METHODS: tuple[Callable[[Case, Run], Found], ...] = (
    divprune, cdpruner, visionzip, tome, fastv, pyramiddrop, sparsevlm, holov, vispruner, hiprune, mmtok, scope, dart,
    prumerge,
)  # fmt: skip


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """How the runs of one implementation compare.

    Attributes:
        robust, equal: number of robust runs, and of those with the same tokens (of ToMe: the same groups).
        ordered, in_order: number of robust runs whose order is known, and of those with the same order.
        difference: largest difference of merged embeddings where the tokens are the same; None: there are none.
        others, others_equal: number of runs that are not robust in float32, and of those with the tokens of float64.
        differing: the robust runs whose tokens differ, as `case/keep`.
    """

    selector: str
    implementation: str
    commit: str
    robust: int = 0
    equal: int = 0
    ordered: int = 0
    in_order: int = 0
    difference: float | None = None
    others: int = 0
    others_equal: int = 0
    differing: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        order = f"{self.in_order} of {self.ordered}" if self.ordered else "–"
        embeddings = (
            "–" if self.difference is None else "≤ 1e-5" if self.difference <= 1e-5 else f"{self.difference:.1f}"
        )
        others = f"{self.others_equal} of {self.others}" if self.others else "–"
        own = (self.selector, self.implementation, self.commit, str(self.robust))
        return (*own, f"{self.equal} of {self.robust}", order, embeddings, others)


def rows(folder: Path = REFERENCE) -> Iterator[Row]:
    """All implementations of all methods, in the order of `METHODS`."""
    with np.load(folder / "inputs.npz") as stored:
        inputs = {name: torch.from_numpy(stored[name]) for name in stored.files}
    for method in METHODS:
        told = json.loads((folder / f"{method.__name__}.json").read_text(encoding="utf-8"))
        arrays = np.load(folder / told["arrays"]) if "arrays" in told else {}
        for name, where in told["implementations"].items():
            row = Row(method.__name__, name, f"{where['repository']}@{where['commit'][:7]}")
            for run in told["runs"]:
                if run["implementation"] == name and "error" not in run and not run.get("padded"):
                    compare(row, method, case_of(inputs, run["case"]), run, arrays)
            yield row


def case_of(inputs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    own = {key.partition("/")[2]: value for key, value in inputs.items() if key.partition("/")[0] == name}
    return {key: value if value.dtype == torch.int64 else value.double() for key, value in own.items()}


def compare(row: Row, method: Callable[[Case, Run], Found], case: dict[str, Tensor], run: Run, arrays: Any) -> None:
    merged = {key: torch.from_numpy(arrays[where]).double() for key, where in run.get("arrays", {}).items()}
    ours = method({**case, "reference": merged.get("clusters", torch.empty(0))}, run)
    same = same_tokens(ours, run, case)
    if not run["robust"]:
        row.others, row.others_equal = row.others + 1, row.others_equal + same
        return
    row.robust, row.equal = row.robust + 1, row.equal + same
    if not same:
        row.differing.append(f"{run['case']}/{run.get('keep', 'own')}")
        return
    if ours.ordered and "order" in run:
        prefix = run.get("stable_prefix", len(run["order"]))
        row.ordered, row.in_order = row.ordered + 1, row.in_order + (ours.kept[:prefix] == run["order"][:prefix])
    for key, made in ours.merged.items():
        if key in merged and "group" not in case:  # with copies, which of them is taken is chance
            row.difference = max(row.difference or 0.0, float((made - merged[key]).abs().max()))


def same_tokens(ours: Found, run: Run, case: Case) -> bool:
    """Whether our tokens are those of the run, in float64 where that was kept; of exact copies any will do."""
    if "owner" in run:
        return ours.owner == (run["owner"] if run["robust"] else run.get("float64_owner", run["owner"]))
    expected = run["kept"] if run["robust"] else run.get("float64_kept", run["kept"])
    mine = set(ours.kept)
    if run["case"] == "n64_equal":
        return sorted(case["group"][list(mine)].tolist()) == sorted(case["group"][expected].tolist())
    return mine == set(expected)


def table(found: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=REFERENCE)
    parser.add_argument("--write", action="store_true", help="replace agreement.md")
    args = parser.parse_args()
    text = table(rows(args.folder))
    if args.write:
        (HERE / "agreement.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
