"""Teach `nano` several images: `python scripts/make_nano_volumes.py --out runs/nano-volumes`.

The language model of nano is trained further, the encoder stays as it is. It learns to find a finding in a stack of
slices, to name the slice, and to compare two dates (`data/phantom_volumes.py`): from all tokens, and the answer also
from those of the evidence with a random part of the others.

Slices are encoded once and put together anew for each lesson: a stack is one of a bank of volumes, of which slices
without a finding are left out at random, so that their number and the slices' numbers vary. Short stacks come first:
which slice a token belongs to is learned from them at a third of the cost.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from muon import make_optimizers
from nano_model import NANO_SPEC
from plain_loop import train_supervised
from progress import reporter

from vitos.backbones import Backbone
from vitos.core.prompt import VisualTokens
from vitos.core.response import format_box_list, format_localization, format_reasoning
from vitos.data.phantom import render
from vitos.data.phantom_volumes import SLICES, STACK_TEMPLATES, Stack, StackQuestion, write_volumes
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.policy.vlm import SparseVLM
from vitos.rl.checkpoint import staged_folder
from vitos.rl.lessons import Exercise, Lesson

FIRST_SEED = 7 * 10**9  # beyond the splits of both kinds of phantoms
LESSONS = 4  # stacks of a batch
SHORTEST, FEW = 4, 5  # images of the shortest stacks, and of those at the beginning


@dataclass(frozen=True)
class Banked:
    """A stack with its question and the visual tokens of its images."""

    stack: Stack
    question: StackQuestion
    visuals: tuple[VisualTokens, ...]


def make_bank(backbone: Backbone, count: int, seed: int) -> list[Banked]:
    """Stacks of all templates in turn, encoded."""
    names, bank = list(STACK_TEMPLATES), []
    for index in range(count):
        rng = np.random.default_rng([FIRST_SEED + seed * 10**7 + index, 26])
        stack, question = STACK_TEMPLATES[names[index % len(names)]](rng, SLICES)
        with torch.no_grad():
            visuals = tuple(backbone.encode([render(scene) for scene in stack]))
        bank.append(Banked(stack, question, visuals))
    return bank


def shortened(one: Banked, most: int, rng: np.random.Generator) -> Banked:
    """At most `most` slices: all with a finding, others at random, numbered from 1 again."""
    needed = [place for place, scene in enumerate(one.stack, start=1) if scene.findings]
    asked = {int(option) for option in one.question.options if option.isdigit()}
    rest = [p for p in range(1, len(one.stack) + 1) if p not in needed]
    room = max(0, most - len(needed))
    chosen = sorted([*needed, *rng.permutation(rest)[:room].tolist()])
    number = {place: n for n, place in enumerate(chosen, start=1)}
    question = one.question
    if asked:
        truth = number[int(question.truth)]
        kept = [number[place] for place in asked if place in number and place != int(question.truth)]
        more = [n for n in number.values() if n != truth and n not in kept]
        wrong = [*kept, *rng.permutation(more).tolist()][:3]
        options = tuple(str(v) for v in rng.permutation([truth, *wrong]).tolist())
        question = replace(question, options=options, truth=str(truth), thought=f"it is slice {truth}")
    elif question.template == "kind_in_slice":
        old = question.evidence[0][1]
        question = replace(question, text=f"What is the finding in slice {number[old]}?")
    evidence = tuple((lesion, number[place]) for lesion, place in question.evidence)
    return Banked(
        tuple(one.stack[p - 1] for p in chosen),
        replace(question, evidence=evidence),
        tuple(one.visuals[p - 1] for p in chosen),
    )


def boxes_text(question: StackQuestion) -> str:
    return format_box_list([[str(b.image), *(f"{v:.2f}" for v in b.as_tuple())] for b in question.boxes])


def lesson(one: Banked, rng: np.random.Generator) -> Lesson:
    """Both branches' formats, and for every kind of finding its boxes."""
    question, images = one.question, len(one.stack)
    text = question.full_text(images)
    lead = text.partition(question.text)[0]
    kind = question.evidence[0][0].kind
    about = "it is there" if question.template.startswith("kind_in") else f"the {kind}"
    exercises = [
        Exercise(NANO_SPEC.localize_text(text), format_localization(about, boxes_text(question), question.truth)),
        reasoning(one),
    ]
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for place, scene in enumerate(one.stack, start=1):
        for f in scene.findings:
            found.setdefault(f.kind, []).append((place, [f"{v:.2f}" for v in f.box.as_tuple()]))
    singles = {k: rows for k, rows in found.items() if len({place for place, _ in rows}) == len(rows)}
    for name, rows in singles.items():
        listed = format_box_list([[str(place), *edges] for place, edges in rows])
        exercises.append(Exercise(f"{lead}Locate the {name}.", f" {name} {listed}"))
    return Lesson(one.visuals, tuple(exercises))


def reasoning(one: Banked) -> Exercise:
    text = one.question.full_text(len(one.stack))
    return Exercise(NANO_SPEC.reason_text(text), format_reasoning(one.question.thought, one.question.truth))


def sparse_lesson(one: Banked, rng: np.random.Generator) -> Lesson:
    """The answer from the tokens of the evidence, and at times a few others."""
    margin, share = int(rng.integers(2)), float(rng.choice([0.0, 0.0, 0.02, 0.1]))
    kept = []
    for place, visual in enumerate(one.visuals, start=1):
        boxes = [replace(lesion.box, image=1) for lesion, image in one.question.evidence if image == place]
        mask = visual.grid.overlapping(boxes, margin) if boxes else np.zeros(visual.grid.num_tokens, dtype=bool)
        kept.append(torch.from_numpy(mask | (rng.random(len(mask)) < share)))
    return Lesson(one.visuals, (reasoning(one),), tuple(kept))


def batches(bank: list[Banked], steps: int, seed: int) -> Iterator[list[Lesson]]:
    """Stacks have up to `FEW` images in the first half of the steps, and grow to all of them in the next quarter."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        longest = round(FEW + (SLICES - FEW) * min(1.0, max(0.0, 4 * step / steps - 2)))
        chosen = [bank[i] for i in rng.choice(len(bank), LESSONS, replace=False)]
        cut = [
            one if one.question.word == "Date" else shortened(one, int(rng.integers(SHORTEST, longest + 1)), rng)
            for one in chosen
        ]
        yield [lesson(one, rng) for one in cut] + [sparse_lesson(one, rng) for one in cut]


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# nano-volumes

The embedded model `nano` of vitos, trained further on synthetic stacks of slices and pairs of dates; its weights are
stored in float16. It shows and tests the method; it knows no real anatomy and is no medical device.

Made by `python scripts/make_nano_volumes.py --out FOLDER --stacks {stacks} --steps {steps} --seed {seed}` in
{minutes:.0f} minutes on {threads} core(s).

On {questions} validation questions (`vitos.data.phantom_volumes`, seed 999, {slices} slices), greedy:

| figure | value |
| --- | --- |
| accuracy, all tokens | {dense_accuracy:.3f} |
| accuracy of the localization branch | {localization_accuracy:.3f} |
| mean IoU of its boxes | {mean_iou:.3f} |
| evidence that parses | {parse_rate:.3f} |
| accuracy from the tokens of its own boxes ({kept_ratio:.1%} kept) | {sparse_accuracy:.3f} |
| accuracy from the tokens of the gold boxes | {control_oracle_accuracy:.3f} |
| accuracy from as many random tokens | {control_random_accuracy:.3f} |

| template | dense | sparse | IoU |
| --- | --- | --- | --- |
{templates}
Chance is 0.25, for `growth` 0.33. It names a finding and compares dates. It hardly knows which slice is which: most of
its boxes lie in a wrong slice, and it does not look a slice up by its number.
"""


def card(policy: SparseVLM, args: argparse.Namespace, minutes: float) -> str:
    """The model card, from validation questions of a seed that nothing else uses."""
    with TemporaryDirectory() as folder:
        records = read_records(write_volumes(Path(folder), "val", args.questions, seed=999))
        settings = Settings(max_localization_tokens=96, max_reasoning_tokens=32, batch_size=8)
        results = summarize(cases_in_memory(policy, records, settings), bootstrap_samples=100)
    rows = "".join(
        f"| {name} | {row['dense']:.3f} | {row['sparse']:.3f} | {row['mean_iou']:.3f} |\n"
        for name, row in results["by_template"].items()
    )
    return CARD.format(minutes=minutes, templates=rows, slices=SLICES, **vars(args) | results)


@torch.no_grad()
def write_half(policy: SparseVLM, folder: Path) -> None:
    """Round the weights to float16, and write a checkpoint that stores them so; it is loaded as float32."""
    weights = {name: weight.half() for name, weight in policy.backbone.model.named_parameters()}
    for name, weight in policy.backbone.model.named_parameters():
        weight.copy_(weights[name])
    policy.save_pretrained(folder, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--stacks", type=int, default=800, help="stacks of the bank")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of embeddings, norms and biases")
    parser.add_argument("--matrix-rate", type=float, default=0.01, help="learning rate of matrices")
    parser.add_argument("--questions", type=int, default=150, help="validation questions of the card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start, report = time.time(), reporter()
    policy = SparseVLM.from_pretrained("nano", device="cpu", spec=NANO_SPEC)
    for module in policy.backbone.vision_modules:
        module.requires_grad_(False)
    bank = make_bank(policy.backbone, args.stacks, args.seed)
    print(f"bank of {len(bank)} stacks after {(time.time() - start) / 60:.1f} min", flush=True)
    train_supervised(
        policy.backbone,
        batches(bank, args.steps, args.seed),
        steps=args.steps,
        learning_rate=args.learning_rate,
        optimizers=make_optimizers(policy.backbone, args.learning_rate, args.matrix_rate),
        on_step=lambda step, loss: report("volumes", step, loss),
    )
    minutes = (time.time() - start) / 60
    with staged_folder(args.out) as staged:
        write_half(policy, staged)
        (staged / "README.md").write_text(card(policy, args, minutes), encoding="utf-8")
    print((args.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
