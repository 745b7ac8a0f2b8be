"""Train `nano`, the embedded model, from nothing: `python scripts/make_nano.py --out src/vitos/nano/weights`.

It becomes what a downloaded vision-language model is: a vision encoder that was trained before, and a language model
that has looked at many images *densely* and has learned to name, localise and answer. It never sees a sparse prompt
here; that is what the dual stream teaches.

1. The encoder learns to say, of every visual token, which finding it sees, where the token lies and which numbers
   write the finding's box, through linear heads that are thrown away. Without this a language model of this size
   stays blind: 500 updates of all weights together left naming and boxes at chance.
2. The language model learns to find a finding by its name, in the shortest form there is: the question is the name,
   the answer its box. Alone this takes some hundred updates; mixed with the rest it was not learned in thousands.
3. The language model learns the mixture: short questions (where is a kind, what is at a point) and both branches'
   formats. It answers with an option's text, not with its letter: binding letters to options costs a model of this
   size more than all the rest (docs/nano.md).

`--legs FOLDER` keeps the model as it is after 1 and after 2 and skips what that folder holds; a model that is put
there as `names` is trained further.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from muon import make_optimizers
from nano_model import NANO_SPEC, build_nano
from PIL import Image
from plain_loop import train_supervised
from progress import reporter
from torch import nn
from torch.nn import functional as F

from vitos.backbones import Backbone
from vitos.core.geometry import TokenGrid
from vitos.core.prompt import VisualTokens
from vitos.core.response import format_box_list, format_localization, format_reasoning
from vitos.data.phantom import KINDS, TEMPLATES, Lesion, PhantomQuestion, Scene, render, sample, write_phantoms
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.policy.vlm import SparseVLM
from vitos.rl.checkpoint import is_complete, staged_folder
from vitos.rl.lessons import Exercise, Lesson

SIDE = 8  # rows and columns of the token grid
SCENES, SHORT, LONG = 10, 4, 3  # scenes of a batch; short questions and questions of the templates about each
# How much oftener a batch holds scenes made for the templates that are learned last.
OFTEN = {"how_many": 2.5, "larger_of_two": 2.0}
NAMED_SCENES = 24  # scenes of a batch while it learns names only
# Seeds of the scenes it learns from: beyond those of the splits that `vitos data phantom` writes.
FIRST_SEED = 5 * 10**9
NAMING = ("kind_at_point", "kind_in_region")  # templates that ask for a name


# --- scenes ---------------------------------------------------------------------------------------------------------


def make_scene(seed: int) -> tuple[Scene, np.ndarray]:
    """A scene made for one of the templates, and its grey picture."""
    names = list(TEMPLATES)
    scene, _ = sample(seed, names[seed % len(names)])
    return scene, np.asarray(render(scene).convert("L"))


def make_scenes(count: int, seed: int) -> tuple[list[Scene], list[Image.Image]]:
    """Scenes that no split of `vitos data phantom` holds."""
    first = FIRST_SEED + seed * 10**7
    with get_context("spawn").Pool(2) as pool:
        made = pool.map(make_scene, range(first, first + count), chunksize=64)
    return [scene for scene, _ in made], [Image.fromarray(grey).convert("RGB") for _, grey in made]


# --- the encoder ----------------------------------------------------------------------------------------------------


def cell_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Kind of the finding that each cell overlaps most, 0 for none, (64,), and its box in hundredths, (64, 4)."""
    grid = TokenGrid.single(SIDE, SIDE)
    kinds, boxes = np.zeros(grid.num_tokens, dtype=np.int64), np.zeros((grid.num_tokens, 4), dtype=np.int64)
    most = np.full(grid.num_tokens, 0.15)  # share of the cell; a sliver is not a finding
    (view,) = grid.views
    for finding in scene.findings:
        box = finding.box
        for cell in np.flatnonzero(grid.overlapping([box])):
            rect = view.cell_boxes()[cell]
            width = min(rect.x2, box.x2) - max(rect.x1, box.x1)
            height = min(rect.y2, box.y2) - max(rect.y1, box.y1)
            if width * height * grid.num_tokens > most[cell]:
                most[cell] = width * height * grid.num_tokens
                kinds[cell] = 1 + KINDS.index(finding.kind)
                boxes[cell] = [round(100 * v) for v in box.as_tuple()]
    return kinds, boxes


def train_encoder(
    backbone: Backbone, scenes: Sequence[Scene], images: Sequence[Image.Image], steps: int, report: Callable[..., None]
) -> None:
    """Teach the vision encoder and its merger, 16 images an update."""
    targets = [cell_targets(scene) for scene in scenes]
    kinds, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*targets, strict=True))
    cells = torch.arange(SIDE * SIDE)
    # A box is read out as the embeddings of its four numbers, the code in which the language model has to write it.
    ids = [backbone.tokenizer.get_vocab()[f"{i / 100:.2f}"] for i in range(101)]
    numbers = F.normalize(backbone.model.lm_head.weight[ids].detach().clone(), dim=-1)
    width = numbers.shape[1]
    head = nn.Linear(width, 1 + len(KINDS) + 2 * SIDE + 4 * width)
    modules = [*backbone.vision_modules, head]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    weight = torch.tensor([0.3] + [1.0] * len(KINDS))
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (16,))
        tokens = torch.stack([v.embeddings for v in backbone.encode([images[i] for i in index])])
        kind, row, column, box = head(tokens).split([1 + len(KINDS), SIDE, SIDE, 4 * width], dim=-1)
        found = kinds[index] > 0
        loss = (
            F.cross_entropy(kind.flatten(0, 1), kinds[index].flatten(), weight=weight)
            + 0.3 * F.cross_entropy(row.flatten(0, 1), (cells // SIDE).repeat(len(index)))
            + 0.3 * F.cross_entropy(column.flatten(0, 1), (cells % SIDE).repeat(len(index)))
            + 0.5 * F.cross_entropy(3 * box[found].view(-1, width) @ numbers.T, boxes[index][found].view(-1))
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        right = (kind.argmax(-1) == kinds[index])[found].float().mean()
        report(step, loss.item(), right.item())


# --- the language model ---------------------------------------------------------------------------------------------


def boxes_text(findings: Sequence[Lesion]) -> str:
    return format_box_list([[f"{v:.2f}" for v in f.box.as_tuple()] for f in findings])


def scene_lesson(scene: Scene, own: str, visual: VisualTokens, rng: np.random.Generator) -> Lesson:
    """Short questions, the one the scene was made for, and others that it can carry; two of them for both branches.

    Counting is asked only of scenes made for it: in the others one is the rule, and lists of boxes would learn to end.
    """
    short = short_exercises(scene, rng)
    exercises = [*name_exercises(scene), *(short[i] for i in rng.permutation(len(short))[:SHORT])]
    names = [own, *rng.permutation([name for name in TEMPLATES if name not in (own, "how_many")])]
    asked = [q for name in names if (q := TEMPLATES[name](scene, rng)) is not None][:LONG]
    for place, q in enumerate(asked):
        exercises.append(localize_exercise(q))
        if place < 2:
            exercises.append(reason_exercise(q))
    return Lesson((visual,), tuple(exercises))


def name_exercises(scene: Scene) -> list[Exercise]:
    """The name of each kind that occurs once, and its box."""
    kinds = [f.kind for f in scene.findings]
    return [Exercise(f"<image>{f.kind}", boxes_text([f])) for f in scene.findings if kinds.count(f.kind) == 1]


def localize_exercise(q: PhantomQuestion) -> Exercise:
    """Where to look, the boxes, and the answer, which can be read off them: a name is not guessed before looking."""
    kinds = dict.fromkeys(f.kind for f in q.evidence)
    about = "it is there" if q.template in NAMING else f"the {' and the '.join(kinds)}"
    return Exercise(
        NANO_SPEC.localize_text(q.full_text), format_localization(about, boxes_text(ordered_evidence(q)), q.truth)
    )


def reason_exercise(q: PhantomQuestion) -> Exercise:
    """The answer behind a short thought."""
    return Exercise(NANO_SPEC.reason_text(q.full_text), format_reasoning(q.thought, q.truth))


def ordered_evidence(q: PhantomQuestion) -> Sequence[Lesion]:
    """As the question names them, findings of one kind in reading order."""
    return q.evidence if q.template == "larger_of_two" else in_reading_order(q.evidence)


def short_exercises(scene: Scene, rng: np.random.Generator) -> list[Exercise]:
    """Boxes, number and quadrant of a kind, and what is at a point: most to be learned per token."""
    found = in_reading_order(scene.findings)
    by_kind = {kind: [f for f in found if f.kind == kind] for kind in KINDS}
    out = [
        Exercise(f"<image>Locate the {kind}.", f" {kind} {boxes_text(own)}") for kind, own in by_kind.items() if own
    ]
    out += [Exercise(f"<image>How many of kind {kind}?", f" {len(own)}") for kind, own in by_kind.items() if own]
    out += [
        Exercise(f"<image>Where is the {k}?", f" {own[0].quadrant}") for k, own in by_kind.items() if len(own) == 1
    ]
    for f in found:
        x, y = np.clip(np.array([f.x, f.y]) + rng.uniform(-0.02, 0.02, 2), 0, 1)
        out.append(Exercise(f"<image>What is at ({x:.2f}, {y:.2f})?", f" {boxes_text([f])} {f.kind}"))
    return out


def in_reading_order(findings: Sequence[Lesion]) -> list[Lesion]:
    return sorted(findings, key=lambda f: (f.y, f.x))


def name_batches(scenes: Sequence[Scene], visuals: Sequence[VisualTokens], seed: int) -> Iterator[list[Lesson]]:
    """Names only, of scenes in which there is something to choose."""
    rng = np.random.default_rng(seed)
    lessons = [
        Lesson((visual,), tuple(named))
        for scene, visual in zip(scenes, visuals, strict=True)
        if len(scene.findings) > 1 and (named := name_exercises(scene))
    ]
    while True:
        yield [lessons[i] for i in rng.choice(len(lessons), NAMED_SCENES, replace=False)]


def batches(scenes: Sequence[Scene], visuals: Sequence[VisualTokens], seed: int) -> Iterator[list[Lesson]]:
    """Lessons of random scenes; questions are drawn anew each time."""
    rng = np.random.default_rng(seed)
    made_for = [list(TEMPLATES)[i % len(TEMPLATES)] for i in range(len(scenes))]  # `make_scene` takes them in turn
    weights = np.array([OFTEN.get(name, 1.0) for name in made_for])
    while True:
        chosen = rng.choice(len(scenes), SCENES, replace=False, p=weights / weights.sum())
        yield [scene_lesson(scenes[i], made_for[i], visuals[i], rng) for i in chosen]


@torch.no_grad()
def encode_all(backbone: Backbone, images: Sequence[Image.Image]) -> list[VisualTokens]:
    return [v for start in range(0, len(images), 32) for v in backbone.encode(images[start : start + 32])]


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# nano

The embedded model of vitos: Qwen2.5-VL architecture with {parameters:,} parameters and a vocabulary of {vocabulary},
float32. It looks at synthetic slices ("phantoms") of 128 x 128 pixels through 8 x 8 visual tokens. It shows and tests
the method; it knows no real anatomy and is no medical device.

Made by `python scripts/make_nano.py --out FOLDER --scenes {scenes} --encoder-steps {encoder_steps}
--name-steps {name_steps} --steps {steps} --matrix-rate {matrix_rate} --seed {seed}` in {minutes:.0f} minutes on
{threads} core(s), from generated scenes only. It has seen dense images only, never a sparse prompt.

On {questions} validation questions (`vitos data phantom`, seed 999), greedy:

| figure | value |
| --- | --- |
| accuracy, all tokens | {dense_accuracy:.3f} |
| accuracy of the localization branch | {localization_accuracy:.3f} |
| mean IoU of its boxes | {mean_iou:.3f} |
| evidence that parses | {parse_rate:.3f} |
| accuracy from the tokens of its own boxes ({kept_ratio:.0%} kept), untrained for that | {sparse_accuracy:.3f} |
| accuracy from the tokens of the gold boxes | {control_oracle_accuracy:.3f} |
| accuracy from as many random tokens | {control_random_accuracy:.3f} |

{templates}
Chance is 0.25, for `larger_of_two` 0.5.
"""


def card(policy: SparseVLM, args: argparse.Namespace, minutes: float) -> str:
    """The model card, from 500 validation questions of a seed that no recipe uses."""
    with TemporaryDirectory() as folder:
        records = read_records(write_phantoms(Path(folder), "val", 500, seed=999))
        settings = Settings(max_localization_tokens=96, max_reasoning_tokens=64)
        results = summarize(cases_in_memory(policy, records, settings), bootstrap_samples=100)
    rows = "".join(
        f"| {name} | {row['dense']:.3f} | {row['sparse']:.3f} | {row['mean_iou']:.3f} |\n"
        for name, row in results["by_template"].items()
    )
    return CARD.format(
        parameters=sum(p.numel() for p in policy.backbone.model.parameters()),
        vocabulary=len(policy.backbone.tokenizer),
        minutes=minutes,
        questions=results["num_questions"],
        templates="| template | dense | sparse | IoU |\n| --- | --- | --- | --- |\n" + rows,
        **vars(args),
        **results,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--encoder-steps", type=int, default=1200)
    parser.add_argument("--name-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=3000, help="updates of the mixture")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of embeddings, norms and biases")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="learning rate of matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--legs", type=Path, help="folder that keeps the model between the parts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        make(args, args.legs or Path(folder))


def train_language(
    policy: SparseVLM,
    lessons: Iterable[Sequence[Lesson]],
    steps: int,
    args: argparse.Namespace,
    report: Callable[..., None],
) -> None:
    """Teach the language model behind the frozen encoder."""
    for module in policy.backbone.vision_modules:
        module.requires_grad_(False)
    train_supervised(
        policy.backbone,
        lessons,
        steps=steps,
        learning_rate=args.learning_rate,
        optimizers=make_optimizers(policy.backbone, args.learning_rate, args.matrix_rate),
        on_step=report,
    )


def make(args: argparse.Namespace, legs: Path) -> None:
    """All parts that `legs` does not hold, and the model card."""
    start, report = time.time(), reporter()

    scenes, images = make_scenes(args.scenes, args.seed)
    if not is_complete(legs / "names"):
        if not is_complete(legs / "encoder"):
            policy = SparseVLM(build_nano(args.seed), NANO_SPEC)
            train_encoder(policy.backbone, scenes, images, args.encoder_steps, partial(report, "encoder"))
            with staged_folder(legs / "encoder") as folder:
                policy.save_pretrained(folder)
        policy = SparseVLM.from_pretrained(legs / "encoder")
        visuals = encode_all(policy.backbone, images)
        train_language(
            policy, name_batches(scenes, visuals, args.seed), args.name_steps, args, partial(report, "names")
        )
        with staged_folder(legs / "names") as folder:
            policy.save_pretrained(folder)
    policy = SparseVLM.from_pretrained(legs / "names")
    visuals = encode_all(policy.backbone, images)
    train_language(policy, batches(scenes, visuals, args.seed), args.steps, args, partial(report, "mixture"))
    policy.save_pretrained(args.out)
    text = card(policy, args, (time.time() - start) / 60)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
