"""Train `nano-real`, the small model for real images: `python scripts/make_nano_real.py --work FOLDER`.

LLaVA with a frozen DINOv2-S and a decoder of two million parameters, from train images of `../shared/data` only, a
tenth of which is held out for choices. Legs, each kept in the folder and skipped where it is there:

1. `splits`: the train questions as records, `fit.json` and `val.json` (held out), with their images.
2. `features`: scenes (images changed so that boxes and answers stay true) and what DINOv2 sees in them.
3. `projector`: says of every token where it is, which finding it sees and how the finding's box is written.
4. `look`: the decoder learns to look at a place, among a few tokens of many scenes, then among ever more of them.
5. `names`: it learns to find a kind by its name, from the tokens of findings and a part of the others.
6. `sparse`: all questions, from the evidence's tokens and a part of the others ("naming from gold tokens first").
7. `dense`: all questions, mostly from all tokens.
8. `boxes`: the same, with the start of a skill: to copy a box of the question to the digit.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from muon import make_optimizers
from nano_real.build import SPEC, build_nano_real
from nano_real.copy import hold_copying
from nano_real.features import load_features, make_features
from nano_real.learn import Teacher
from nano_real.projector import PlacePath, hold_places, train_projector
from nano_real.scenes import SETS, Source, read_sources
from nano_real.start import hold_circuit
from plain_loop import train_supervised
from progress import reporter

from vitos.data.files import atomic_folder, write_json_atomic
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.nano.real import save_decoder
from vitos.policy.vlm import SparseVLM
from vitos.rl.checkpoint import is_complete, staged_folder
from vitos.rl.lessons import Lesson


@dataclass(frozen=True)
class Leg:
    """One part of the decoder's training.

    Attributes:
        full: share of lessons that show all tokens; the others show the evidence and a random part of the rest.
        answer_weight: of the tokens of an answer in the loss.
        matrix_rate: of Muon. At 0.02 the first updates of `look`, all of one direction, destroy what it starts with.
        copies: hold the heads that copy a box of the question.
    """

    name: str
    full: float
    answer_weight: float = 1.0
    matrix_rate: float = 0.01
    copies: bool = False


KEPT_EVERY = 200  # updates after which an unfinished leg keeps its model
LEGS = (
    Leg("look", 0.0, matrix_rate=0.005),
    Leg("names", 0.1),
    Leg("sparse", 0.1),
    Leg("dense", 0.8, 4.0),
    Leg("boxes", 0.8, 4.0, copies=True),
)
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# nano-real

The decoder of vitos' small model for real images: LLaVA architecture, two million parameters, float16, behind a
frozen DINOv2-S that is not in this folder. Trained on train images of three public sets (BCCD, MIT; Jun Cheng's brain
tumours, CC BY 4.0; Data Science Bowl 2018, CC0). It answers those sets' twelve kinds of question and no other, and is
no medical device. How it was made: `scripts/make_nano_real.py`, docs/nano-real.md.

On {num_questions} questions about held-out train images, greedy, before any reinforcement learning:

| figure | value |
| --- | --- |
| accuracy, all tokens | {dense_accuracy:.3f} |
| accuracy of the localization branch | {localization_accuracy:.3f} |
| accuracy from the tokens of its own boxes ({kept_ratio:.0%} kept) | {sparse_accuracy:.3f} |
| questions without a readable box, answered from all tokens | {fallback_rate:.3f} |
| accuracy from as many random tokens | {control_random_accuracy:.3f} |
| accuracy from the tokens of the gold boxes | {control_oracle_accuracy:.3f} |
| mean IoU of its boxes | {mean_iou:.3f} |

| template | questions | dense | sparse | random | gold boxes | IoU |
| --- | --- | --- | --- | --- | --- | --- |
{templates}
Chance is 0.34 over all of them.
"""


def write_splits(data: Path, sources: Sequence[Source], folder: Path) -> None:
    """`fit.json` and `val.json` of every set, in the release's format, beside copies of their images."""
    held_out = {source.path for source in sources if source.held_out}
    for name in SETS:
        records = json.loads((data / name / "train.json").read_text(encoding="utf-8"))
        metas = json.loads((data / name / "meta.json").read_text(encoding="utf-8"))
        templates = [m["template"] for m in metas if m["split"] == "train"]
        parts: dict[str, list[object]] = defaultdict(list)
        for record, template in zip(records, templates, strict=True):
            path = data / name / record["image_path"][0]
            target = folder / name / record["image_path"][0]
            if not target.exists():  # an image has several questions
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            parts["val" if path in held_out else "fit"].append({**record, "template": template})
        for part, own in parts.items():
            write_json_atomic(folder / name / f"{part}.json", own)


def train_language(
    policy: SparseVLM,
    lessons: Iterable[Sequence[Lesson]],
    steps: int,
    report: Callable[..., None],
    leg: Leg,
    *,
    keep: Path,
    path: PlacePath,
) -> None:
    """Teach the decoder and the projector behind the frozen encoder.

    Args:
        path: of the projector, which stays as it is, as does the circuit of the decoder's start.
        keep: folder for the model of every `KEPT_EVERY`-th update.
    """
    backbone = policy.backbone

    def on_step(step: int, loss: float) -> None:
        report(step, loss)
        path.restore()
        hold_circuit(backbone)
        if leg.copies:
            hold_copying(backbone)
        if step % KEPT_EVERY == 0:
            with staged_folder(keep) as folder:
                policy.save_pretrained(folder)

    backbone.model.requires_grad_(True)
    backbone.model.model.vision_tower.requires_grad_(False)
    train_supervised(
        backbone,
        lessons,
        steps=steps,
        learning_rate=1e-3,
        optimizers=make_optimizers(backbone, 1e-3, leg.matrix_rate),
        answer_weight=leg.answer_weight,
        on_step=on_step,
    )


def make(args: argparse.Namespace) -> None:
    report = reporter()
    work: Path = args.work
    sources = read_sources(args.data)
    if not (work / "splits").is_dir():
        with atomic_folder(work / "splits") as folder:
            write_splits(args.data, sources, folder)
    if not (work / "features" / "features.npy").is_file():
        make_features(sources, args.vision, work / "features", args.seed)
    scenes, features = load_features(work / "features")

    if args.start is None and not is_complete(work / "projector"):
        backbone = build_nano_real(args.vision, scenes, args.seed)
        train_projector(backbone, features, scenes, args.projector_steps, partial(report, "projector"))
        with staged_folder(work / "projector") as folder:
            SparseVLM(backbone, SPEC).save_pretrained(folder)

    before: Path | str = args.start or work / "projector"
    for place, leg in enumerate(LEGS):
        if args.start is not None and leg is not LEGS[-1]:
            continue
        if not is_complete(work / leg.name):
            policy = SparseVLM.from_pretrained(before)
            teacher = Teacher(policy.backbone, features, scenes, SPEC, full=leg.full, seed=args.seed + place)
            steps = getattr(args, f"{leg.name}_steps")
            lessons = {"look": teacher.look_batches(16, steps), "names": teacher.name_batches(20)}.get(
                leg.name, teacher.batches(12)
            )
            unfinished = work / f"{leg.name}-unfinished"  # to look at on the way or after a crash
            path = hold_places(policy.backbone.model.model.multi_modal_projector, features)
            train_language(policy, lessons, steps, partial(report, leg.name), leg, keep=unfinished, path=path)
            with staged_folder(work / leg.name) as folder:
                policy.save_pretrained(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
        before = work / leg.name
    if args.out is not None:
        finish(SparseVLM.from_pretrained(before), Path(before), work / "splits", args.out)


def finish(policy: SparseVLM, checkpoint: Path, splits: Path, out: Path) -> None:
    """Write what ships, with a model card of figures on the held-out images."""
    records = [record for name in SETS for record in read_records(splits / name / "val.json")]
    cases = cases_in_memory(policy, records, Settings(max_localization_tokens=256, max_reasoning_tokens=32))
    results = summarize(cases, bootstrap_samples=100)
    columns = ("dense", "sparse", "random", "oracle", "mean_iou")
    rows = "".join(
        f"| {name} | {row['num_questions']} | "
        + " | ".join("–" if row[column] is None else f"{row[column]:.3f}" for column in columns)
        + " |\n"
        for name, row in results["by_template"].items()
    )
    save_decoder(checkpoint, out)
    (out / "README.md").write_text(CARD.format(templates=rows, **results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every leg")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--vision", type=Path, default=Path("../shared/models/dinov2-small"), help="DINOv2-S")
    parser.add_argument("--projector-steps", type=int, default=4000)
    parser.add_argument("--look-steps", type=int, default=250)
    parser.add_argument("--names-steps", type=int, default=250)
    parser.add_argument("--sparse-steps", type=int, default=400)
    parser.add_argument("--dense-steps", type=int, default=600)
    parser.add_argument("--boxes-steps", type=int, default=300)
    parser.add_argument("--start", help="a whole model of the same layers, to begin the last leg with")
    parser.add_argument("--out", type=Path, help="folder for the decoder that ships, with a model card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    make(args)


if __name__ == "__main__":
    main()
