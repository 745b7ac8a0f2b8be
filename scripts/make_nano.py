"""Train `nano`, the embedded model, from nothing: `python scripts/make_nano.py --out src/vitos/nano/weights`.

It becomes what a downloaded vision-language model is: one that has looked at many images *densely* and has learned to
name, list, localise and answer. It never sees a sparse prompt here; that is what the dual stream teaches. Tasks: both
branches' formats and a list of all findings with boxes, on dense images from small windows up to whole slices, and a
text-only task that binds what is said to an option's letter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitos.data.phantom import KINDS, QUADRANTS, TEMPLATES, Finding, Scene, render, sample
from vitos.nano.build import DESCRIBE_PROMPT, NANO_SPEC, build_nano
from vitos.response import format_box_list, format_localization, format_reasoning
from vitos.supervised import Exercise, Lesson, train_supervised

TEXTS = 6  # text-only lessons in a batch
# Seeds of the scenes it learns from: beyond those of the splits that `vitos data phantom` writes.
FIRST_SEED = 5 * 10**9
# Share of the run, and how many windows of which side in pixels make a batch (128: the whole image). Naming is learned
# on close-ups, where there is little to look at, and carried over.
CURRICULUM: tuple[tuple[float, dict[int, int]], ...] = (
    (0.12, {48: 14, 128: 5}),
    (0.30, {48: 6, 128: 9}),
    (1.00, {48: 2, 128: 11}),
)


def boxes_text(findings: Sequence[Finding]) -> str:
    return format_box_list([[f"{v:.2f}" for v in f.box.as_tuple()] for f in findings])


def crop(scene: Scene, image: Image.Image, side: int, rng: np.random.Generator) -> tuple[Scene, Image.Image] | None:
    """A square window with at least one finding and none cut by its edge; None where no such window was found."""
    whole = image.width
    for _ in range(50):
        left, top = rng.integers(0, whole - side + 1, size=2)

        def seen(v: float, start: int) -> float:
            return (v * whole - start) / side

        moved = [
            replace(f, x=seen(f.x, left), y=seen(f.y, top), radius=f.radius * whole / side) for f in scene.findings
        ]
        inside = [f for f in moved if f.radius < min(f.x, f.y, 1 - f.x, 1 - f.y)]
        outside = [f for f in moved if not -f.radius < f.x < 1 + f.radius or not -f.radius < f.y < 1 + f.radius]
        if inside and len(inside) + len(outside) == len(moved):
            organs = tuple(
                replace(o, x=seen(o.x, left), y=seen(o.y, top), rx=o.rx * whole / side, ry=o.ry * whole / side)
                for o in scene.organs
            )
            window = image.crop((left, top, left + side, top + side))
            return Scene(organs, tuple(inside), scene.texture_seed), window
    return None


def scene_lesson(seed: int, side: int) -> Lesson | None:
    """A scene made for one template, or a window of it, with questions of all templates that it can carry."""
    torch.set_num_threads(1)  # in a worker process
    rng = np.random.default_rng([seed, 7])
    names = list(TEMPLATES)
    scene, first = sample(seed, names[seed % len(names)])
    image, asked = render(scene), [first]
    if side < image.width:
        cropped = crop(scene, image, side, rng)
        if cropped is None:
            return None
        (scene, image), asked = cropped, []
    # Near the midlines of a window, "upper left" may be in doubt.
    clear = all(abs(f.x - 0.5) > 0.04 and abs(f.y - 0.5) > 0.04 for f in scene.findings)
    others = [n for n in names if not (asked and n == first.template) and (clear or n != "which_quadrant")]
    asked += [q for n in rng.permutation(others) if (q := TEMPLATES[n](scene, rng)) is not None]
    exercises = []
    for index, q in enumerate(asked[:3]):
        evidence = sorted(q.evidence, key=lambda f: (f.y, f.x))
        if index == 0 or index % 2 == seed % 2:
            target = format_localization(q.thought, boxes_text(evidence), q.answer)
            exercises.append(Exercise(NANO_SPEC.localize_text(q.full_text), target))
        if index == 0 or index % 2 != seed % 2:
            exercises.append(Exercise(NANO_SPEC.reason_text(q.full_text), format_reasoning(q.thought, q.answer)))
    listed = sorted(scene.findings, key=lambda f: (f.y, f.x))
    exercises.append(Exercise(DESCRIBE_PROMPT, "\n".join(f"{f.kind} {boxes_text([f])}" for f in listed)))
    return Lesson((image,), tuple(exercises))


def text_lesson(rng: np.random.Generator) -> Lesson:
    """Which option says what is said: the binding of words to letters, without an image."""
    exercises = []
    for _ in range(5):
        words = (KINDS, QUADRANTS, ("1", "2", "3", "4"))[rng.integers(3)]
        options = [words[i] for i in rng.permutation(len(words))][: rng.integers(2, 5)]
        said = f"it is {'a ' if words is KINDS else ''}{options[rng.integers(len(options))]}"
        letter = "ABCD"[options.index(said.removeprefix("it is ").removeprefix("a "))]
        listed = "".join(f"\n{name}. {option}" for name, option in zip("ABCD", options, strict=False))
        text = NANO_SPEC.reason_text(f"{said}. Which option says it?{listed}")
        exercises.append(Exercise(text, format_reasoning(said, letter)))
    return Lesson((), tuple(exercises))


def batches(seed: int, steps: int, workers: int) -> Iterator[list[Lesson]]:
    """Fresh scenes for every batch, drawn in worker processes; the run depends on the seed alone."""
    rng = np.random.default_rng(seed)
    seeds = itertools.count(FIRST_SEED + seed * 10**7)

    def orders(step: int) -> list[tuple[int, int]]:
        windows = next(row for share, row in CURRICULUM if step <= share * steps)
        return [(next(seeds), side) for side, count in windows.items() for _ in range(count)]

    with get_context("spawn").Pool(workers) as pool:
        # Asked for a few batches ahead only: Pool.imap would draw the whole endless series into memory.
        ahead = deque(pool.starmap_async(scene_lesson, orders(step)) for step in range(4))
        for step in range(4, steps + 4):
            ahead.append(pool.starmap_async(scene_lesson, orders(min(step, steps))))
            scenes = [lesson for lesson in ahead.popleft().get() if lesson is not None]
            yield scenes + [text_lesson(rng) for _ in range(TEXTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone, start = build_nano(args.seed), time.time()
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 50 == 0:
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss": round(float(np.mean(losses[-50:])), 4),
                        "minutes": round((time.time() - start) / 60, 2),
                    }
                ),
                flush=True,
            )
        if step % 200 == 0:
            save(args.out)

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        backbone.image_processor.save_pretrained(folder)
        NANO_SPEC.save(folder, backbone)

    train_supervised(
        backbone,
        batches(args.seed, args.steps, workers=1),
        steps=args.steps,
        learning_rate=args.learning_rate,
        on_step=report,
    )
    save(args.out)


if __name__ == "__main__":
    main()
