"""Train `nano-real`, the small model for real images: `python scripts/make_nano_real.py --work FOLDER`.

LLaVA with a frozen DINOv2-S and a decoder of two million parameters, from train images of `../shared/data` only, a
tenth of which is held out for choices. Legs, each kept in the folder and skipped where it is there:

1. `splits`: the train questions as records, `fit.json` and `val.json` (held out), with their images.
2. `features`: scenes (images changed so that boxes and answers stay true) and what DINOv2 sees in them.
3. `projector`: says of every token which finding it sees, where it lies and how its box is written.
4. `names`: the decoder learns to find a kind by its name, from the tokens of findings and a part of the others.
5. `sparse`: all questions, from the evidence's tokens and a part of the others ("naming from gold tokens first").
6. `dense`: all questions, mostly from all tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from muon import make_optimizers
from nano_real.build import SPEC, build_nano_real
from nano_real.features import load_features, make_features
from nano_real.learn import Teacher, train_projector
from nano_real.scenes import SETS, Source, read_sources

from vitos.data.files import write_json_atomic
from vitos.policy import SparseVLM
from vitos.rl.checkpoint import is_complete, staged_folder
from vitos.supervised import Lesson, train_supervised


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
    answer_weight: float = 1.0,
) -> None:
    """Teach the decoder and the projector behind the frozen encoder."""
    backbone = policy.backbone
    backbone.model.requires_grad_(True)
    backbone.model.model.vision_tower.requires_grad_(False)
    train_supervised(
        backbone,
        lessons,
        steps=steps,
        learning_rate=1e-3,
        optimizers=make_optimizers(backbone, 1e-3, 0.02),
        answer_weight=answer_weight,
        on_step=report,
    )


def make(args: argparse.Namespace) -> None:
    start = time.time()
    seen: deque[tuple[float, ...]] = deque(maxlen=50)

    def report(part: str, step: int, *figures: float) -> None:
        if step == 1:
            seen.clear()
        seen.append(figures)
        if step % 50 == 0:
            means = "  ".join(f"{value:.3f}" for value in np.mean(seen, axis=0))
            print(f"{part} {step}  {means}  {(time.time() - start) / 60:.1f} min", flush=True)

    work: Path = args.work
    sources = read_sources(args.data)
    if not (work / "splits").is_dir():
        write_splits(args.data, sources, work / "splits")
    if not (work / "features" / "features.npy").is_file():
        make_features(sources, args.vision, work / "features", args.seed)
    scenes, features = load_features(work / "features")

    def leg(name: str, before: str, train: Callable[[SparseVLM], None]) -> None:
        if is_complete(work / name):
            return
        policy = SparseVLM.from_pretrained(work / before)
        train(policy)
        with staged_folder(work / name) as folder:
            policy.save_pretrained(folder)

    if not is_complete(work / "projector"):
        backbone = build_nano_real(args.vision, scenes, args.seed)
        train_projector(backbone, features, scenes, args.projector_steps, partial(report, "projector"))
        with staged_folder(work / "projector") as folder:
            SparseVLM(backbone, SPEC).save_pretrained(folder)

    def names(policy: SparseVLM) -> None:
        teacher = Teacher(policy.backbone, features, scenes, SPEC, full=0.1, seed=args.seed)
        train_language(policy, teacher.name_batches(24), args.name_steps, partial(report, "names"))

    def sparse(policy: SparseVLM) -> None:
        teacher = Teacher(policy.backbone, features, scenes, SPEC, full=0.1, seed=args.seed + 1)
        train_language(policy, teacher.batches(12), args.sparse_steps, partial(report, "sparse"))

    def dense(policy: SparseVLM) -> None:
        teacher = Teacher(policy.backbone, features, scenes, SPEC, full=0.8, seed=args.seed + 2)
        train_language(policy, teacher.batches(12), args.dense_steps, partial(report, "dense"), answer_weight=4.0)

    def places(policy: SparseVLM) -> None:
        teacher = Teacher(policy.backbone, features, scenes, SPEC, full=0.5, seed=args.seed + 3)
        train_language(policy, teacher.batches(12), args.place_steps, partial(report, "places"), answer_weight=4.0)

    leg("names", "projector", names)
    leg("sparse", "names", sparse)
    leg("dense", "sparse", dense)
    leg("places", "dense", places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every leg")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--vision", type=Path, default=Path("../shared/models/dinov2-small"), help="DINOv2-S")
    parser.add_argument("--projector-steps", type=int, default=2500)
    parser.add_argument("--name-steps", type=int, default=400)
    parser.add_argument("--sparse-steps", type=int, default=1200)
    parser.add_argument("--dense-steps", type=int, default=1200)
    parser.add_argument("--place-steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    make(args)


if __name__ == "__main__":
    main()
