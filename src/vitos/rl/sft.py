"""Supervised learning of answers and boxes: the warm start before reinforcement learning.

Reinforcement learning improves a skill that a model shows now and then; a model that never writes a box learns nothing
from it. Large models come with that skill; `nano`, and a small model on new data, get it here. A *lesson* is one image
with several exercises about it: the image runs through the model once for all of them.

Simplification: a plain AdamW loop on one device. For supervised fine-tuning of a large model use a library made for
it (such as TRL), with targets from `record_lesson`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vitos.backbones.base import Backbone
from vitos.config.recipe import WarmStartSection
from vitos.core.geometry import WHOLE_IMAGE, Rect
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.record import Record
from vitos.core.response import format_localization, format_reasoning
from vitos.core.sparsify import Fusion
from vitos.data.images import load_image_facts
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM
from vitos.rl.freezing import freeze_others


@dataclass(frozen=True, slots=True)
class Exercise:
    """A user message (with one `<image>` per image of its lesson) and the answer to be learned."""

    text: str
    target: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """Images and the exercises that share them.

    Attributes:
        images: pictures or, for a frozen encoder, their visual tokens.
        exercises: the exercises.
        kept: for each image a mask of the visual tokens to show, bool (N,); None for all tokens.
    """

    images: tuple[Image.Image | VisualTokens, ...]
    exercises: tuple[Exercise, ...]
    kept: tuple[Tensor, ...] | None = None


def record_lesson(
    record: Record,
    images: Sequence[Image.Image],
    backbone: Backbone,
    spec: VitosSpec,
    shown: Rect | Sequence[Rect] = WHOLE_IMAGE,
) -> Lesson:
    """The exercises of one record: for both branches or, without gold boxes, for the reasoning branch alone.

    The thought is the record's `thought`, or the text of the right option. The answer is the letter or the text of the
    right option, as `spec.answer_with` says; it is the letter if the options are not known. A question without options
    is answered by the record's `answer`, the first of those that are accepted.

    Args:
        record: the question with its answer.
        images: the pictures of the record, or the parts of them that the record's paths select.
        backbone: the model.
        spec: prompts and coordinates.
        shown: the part of each stored image, to which boxes refer, that is shown.
    """
    right = record.options.get(record.answer, record.answer)
    thought = record.meta.get("thought") or right
    answer = right if spec.answer_with == "text" else record.answer
    reason = Exercise(spec.reason_text(record.question, record.kind), format_reasoning(thought, answer))
    if not record.boxes:
        return Lesson(tuple(images), (reason,))
    parts = [shown] * len(images) if isinstance(shown, Rect) else shown
    places = {box.image - 1 for box in record.boxes}
    with torch.no_grad():
        placed = {place: backbone.encode([images[place]])[0].within(parts[place]) for place in places}
    boxes = Branches(backbone, spec).evidence_text(record.question, placed, record.boxes)
    localize = Exercise(spec.localize_text(record.question, record.kind), format_localization(thought, boxes, answer))
    return Lesson(tuple(images), (localize, reason))


@dataclass(frozen=True, slots=True)
class _Row:
    """One exercise behind the prefix of its lesson.

    Attributes:
        ids: the rest of the question and the target with its end token, shape (L,).
        asked: number of tokens of the question among them.
        answer: first and last index of the tokens between `<answer>` and `</answer>`; (0, -1) if there are none.
    """

    ids: Tensor
    asked: int
    answer: tuple[int, int]


def supervised_loss(engine: TorchEngine, lessons: Sequence[Lesson], answer_weight: float = 1.0) -> Tensor:
    """Weighted mean negative log-likelihood of the targets' tokens, end token included; a scalar with gradients.

    Args:
        engine: the engine of the model.
        lessons: the lessons of a batch.
        answer_weight: weight of the tokens between `<answer>` and `</answer>`; all others have weight 1. A letter is
            one token in twenty, so with equal weights it would hardly count.
    """
    backbone = engine.backbone
    given = [image for lesson in lessons for image in lesson.images]
    encoded = iter(backbone.encode([image for image in given if isinstance(image, Image.Image)]))
    visuals = iter([next(encoded) if isinstance(image, Image.Image) else image for image in given])
    packed = [_lesson_rows(backbone, lesson, [next(visuals) for _ in lesson.images]) for lesson in lessons]
    scores = engine.score([prefix for prefix, _ in packed], [[row.ids for row in rows] for _, rows in packed])
    rows = [row for _, siblings in packed for row in siblings]
    place = torch.arange(scores.mask.shape[1], device=scores.mask.device)  # (L,)
    asked, first, last = (  # (R, 1) each
        torch.tensor(values, device=place.device)[:, None]
        for values in zip(*((row.asked, *row.answer) for row in rows), strict=True)
    )
    learned = scores.mask & (place >= asked)  # (R, L)
    weight = torch.where((place >= first) & (place <= last), answer_weight, 1.0)[learned]
    return -(weight * scores.logprobs[learned]).sum() / weight.sum()


def _lesson_rows(backbone: Backbone, lesson: Lesson, visuals: Sequence[VisualTokens]) -> tuple[Prompt, list[_Row]]:
    """The common start of a lesson's exercises, and the rest of each."""
    prompts = [backbone.build_prompt(exercise.text, visuals) for exercise in lesson.exercises]
    # All exercises start with the same tokens up to the last visual one; without an image, with the first token.
    shared = int(prompts[0].is_visual.nonzero()[-1]) + 1 if visuals else 1
    prefix = prompts[0].head(shared)
    rows = []
    for prompt, exercise in zip(prompts, lesson.exercises, strict=True):
        if not torch.equal(prompt.input_ids[:shared], prefix.input_ids):
            raise ValueError(
                f"the exercises of a lesson differ before their last image: {lesson.exercises[0].text!r} and "
                f"{exercise.text!r}; move the text behind <image>, or make two lessons of them"
            )
        question = prompt.input_ids[shared:].cpu()
        target = backbone.tokenizer(exercise.target, add_special_tokens=False)
        ids = [*target["input_ids"], backbone.tokenizer.eos_token_id]
        rows.append(
            _Row(
                torch.cat([question, torch.tensor(ids)]), len(question), _answer_span(target, exercise, len(question))
            )
        )
    if lesson.kept is not None:
        prefix = prefix.sparse(lesson.kept, Fusion("none"))
    return prefix, rows


def _answer_span(target: Any, exercise: Exercise, asked: int) -> tuple[int, int]:
    """First and last index of an answer's tokens in a row whose target begins at `asked`."""
    before, tag, answer = exercise.target.partition("<answer>")
    text = answer.partition("</answer>")[0]
    if not text:
        return (0, -1)
    start = len(before + tag)
    return (asked + target.char_to_token(start), asked + target.char_to_token(start + len(text) - 1))


def train_supervised(
    backbone: Backbone,
    batches: Iterable[Sequence[Lesson]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup_share: float = 0.05,
    max_grad_norm: float = 1.0,
    answer_weight: float = 1.0,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train all weights that require gradients for `steps` batches under a one-cycle schedule.

    Args:
        backbone: the model.
        batches: batches of lessons; at least `steps` of them.
        steps: number of updates.
        learning_rate, weight_decay: options of AdamW.
        warmup_share: share of the steps in which the learning rate rises to its peak.
        max_grad_norm: largest norm of the gradient; larger ones are scaled down.
        answer_weight: weight of the answers' tokens, as in `supervised_loss`.
        optimizers: optimizers to use instead of AdamW, each with its peak learning rate.
        on_step: a function that gets the number of steps done and the loss.

    Raises:
        ValueError: if the batches run out, or a loss is not finite.
    """
    engine, parameters = TorchEngine(backbone), [p for p in backbone.model.parameters() if p.requires_grad]
    if optimizers is None:
        optimizers = [torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=warmup_share,
            cycle_momentum=False,
        )
        for optimizer in optimizers
    ]
    backbone.model.train()
    done = 0
    for done, lessons in enumerate(itertools.islice(batches, steps), start=1):
        loss = supervised_loss(engine, lessons, answer_weight)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {done} is {loss.item()}; lower the learning rate")
        backbone.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if on_step is not None:
            on_step(done, loss.item())
    backbone.model.eval()
    if done < steps:
        raise ValueError(f"the lessons ran out after {done} of {steps} steps")


def warm_start(
    policy: SparseVLM,
    records: Sequence[Record],
    section: WarmStartSection,
    unfrozen_parameters: str | Sequence[str] | None = None,
) -> None:
    """Supervised updates on the records' gold boxes and answers, in shuffled order.

    It trains the weights that the training itself trains, and with `section.train_encoder` the vision encoder, too.

    Args:
        policy: the policy; its weights are trained in place.
        records: the questions, with gold boxes where evidence is to be learned.
        section: number of updates and learning rate.
        unfrozen_parameters: as in `TrainOptions`.

    Raises:
        ValueError: as `freeze_others`.
    """
    freeze_others(policy.backbone, unfrozen_parameters, encoder=section.train_encoder)
    bar = tqdm(total=section.steps, unit="update", dynamic_ncols=True)

    def show(step: int, loss: float) -> None:
        bar.update(1)
        bar.set_postfix(loss=f"{loss:.3f}")

    train_supervised(
        policy.backbone,
        _lesson_batches(policy, records, section),
        steps=section.steps,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_share=section.warmup_share,
        on_step=show,
    )
    bar.close()


def _lesson_batches(policy: SparseVLM, records: Sequence[Record], section: WarmStartSection) -> Iterator[list[Lesson]]:
    rng = np.random.default_rng(section.seed)
    lessons: dict[str, Lesson] = {}
    queue: list[int] = []
    while True:
        while len(queue) < section.batch_size:
            queue.extend(rng.permutation(len(records)).tolist())
        batch = [records[queue.pop(0)] for _ in range(section.batch_size)]
        for record in batch:
            if record.id not in lessons:
                opened = [load_image_facts(path) for path in record.image_paths]
                images, shown = [image for image, _ in opened], [facts.shown for _, facts in opened]
                lessons[record.id] = record_lesson(record, images, policy.backbone, policy.spec, shown)
        yield [lessons[record.id] for record in batch]
