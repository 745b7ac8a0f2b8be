"""Lessons: what supervised learning shows and asks, with the questions about one image packed behind it.

A *lesson* is one image (or several that belong together) with exercises about it. The image runs through the model
once for all of them. A block mask and the prompt's own positions keep the exercises apart (`engines/packing.py`), so
the log-probabilities are those of separate prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.geometry import WHOLE_IMAGE, Rect
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.record import Record
from vitos.core.response import format_localization, format_reasoning
from vitos.core.sparsify import Fusion
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.spec import VitosSpec


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
    images: Sequence[Image.Image | VisualTokens],
    backbone: Backbone,
    spec: VitosSpec,
    shown: Rect | Sequence[Rect] = WHOLE_IMAGE,
) -> Lesson:
    """The exercises of one record: for both branches or, without gold boxes, for the reasoning branch alone.

    The thought is the record's `thought`, or the text of the right option. The answer is the letter or the text of the
    right option, as `spec.answer_with` says; without options it is the answer as the record has it, a word or a text.

    Args:
        record: the question with its answer.
        images: the pictures of the record, or the parts of them that the record's paths select; or their visual
            tokens, laid over the stored images already.
        backbone: the model.
        spec: prompts and coordinates.
        shown: the part of each stored image, to which boxes refer, that is shown; not used with visual tokens.
    """
    right = record.options.get(record.answer, record.answer)
    thought = record.meta.get("thought") or right
    answer = right if spec.answer_with == "text" else record.answer
    reason = Exercise(spec.reason_text(record.question, record.kind), format_reasoning(thought, answer))
    if not record.boxes:
        return Lesson(tuple(images), (reason,))
    parts = [shown] * len(images) if isinstance(shown, Rect) else shown
    placed = {
        place: _placed(backbone, images[place], parts[place]) for place in {box.image - 1 for box in record.boxes}
    }
    boxes = Branches(backbone, spec).evidence_text(record.question, placed, record.boxes)
    text = spec.localize_text(record.question, record.kind)
    return Lesson(tuple(images), (Exercise(text, format_localization(thought, boxes, answer)), reason))


@torch.no_grad()
def _placed(backbone: Backbone, image: Image.Image | VisualTokens, shown: Rect) -> VisualTokens:
    """The visual tokens of an image, laid over the stored image."""
    return backbone.encode([image])[0].within(shown) if isinstance(image, Image.Image) else image


def packed_lessons(records: Sequence[Record], lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons of records, those about the same images packed into one.

    Lessons are told apart by the paths of their records' images, and by what stands in front of the images: only
    prompts that begin alike can share a row.
    """
    groups: dict[tuple[Any, ...], list[Lesson]] = {}
    for record, lesson in zip(records, lessons, strict=True):
        starts = {exercise.text.rpartition("<image>")[0] for exercise in lesson.exercises}
        key = (record.image_paths, *sorted(starts)) if record.image_paths and len(starts) == 1 else (id(lesson),)
        groups.setdefault(key, []).append(lesson)
    return [
        replace(group[0], exercises=tuple(exercise for lesson in group for exercise in lesson.exercises))
        for group in groups.values()
    ]


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


@dataclass(frozen=True, slots=True)
class PackedLessons:
    """Lessons as prompts with rows behind them, ready to be scored in parts.

    Attributes:
        prompts: the common start of each lesson's exercises.
        rows: the rest of each exercise.
        answer_weight: weight of the tokens between `<answer>` and `</answer>`; all others have weight 1.
    """

    prompts: list[Prompt]
    rows: list[list[_Row]]
    answer_weight: float

    @property
    def token_ids(self) -> list[list[Tensor]]:
        """Token ids of the rows behind each prompt."""
        return [[row.ids for row in siblings] for siblings in self.rows]

    @property
    def learned(self) -> int:
        """Number of tokens that are learned."""
        return sum(len(row.ids) - row.asked for siblings in self.rows for row in siblings)

    @property
    def weight(self) -> float:
        """Sum of the weights of all tokens that are learned: what the mean is divided by."""
        answers = sum(last - first + 1 for siblings in self.rows for first, last in (row.answer for row in siblings))
        return self.learned + (self.answer_weight - 1) * answers

    def loss(self, engine: TorchEngine, part: Sequence[int], weight: float | None = None) -> Tensor:
        """Weighted negative log-likelihood of some lessons' targets, divided by `weight`; a scalar with gradients.

        Args:
            engine: the engine of the model.
            part: indices of the lessons to run together.
            weight: sum of the weights of the whole batch; None for that of `part`.
        """
        rows = [row for index in part for row in self.rows[index]]
        scores = engine.score([self.prompts[i] for i in part], [[row.ids for row in self.rows[i]] for i in part])
        place = torch.arange(scores.mask.shape[1], device=scores.mask.device)  # (L,)
        asked, first, last = (  # (R, 1) each
            torch.tensor(values, device=place.device)[:, None]
            for values in zip(*((row.asked, *row.answer) for row in rows), strict=True)
        )
        learned = scores.mask & (place >= asked)  # (R, L)
        weights = torch.where((place >= first) & (place <= last), self.answer_weight, 1.0)[learned]
        return -(weights * scores.logprobs[learned]).sum() / (weights.sum() if weight is None else weight)


def pack_lessons(backbone: Backbone, lessons: Sequence[Lesson], answer_weight: float = 1.0) -> PackedLessons:
    """Encode the lessons' pictures, with gradients if the encoder trains, and lay out their exercises.

    Raises:
        ValueError: for a lesson whose exercises differ in front of their last image.
    """
    given = [image for lesson in lessons for image in lesson.images]
    encoded = iter(backbone.encode([image for image in given if isinstance(image, Image.Image)]))
    visuals = iter([next(encoded) if isinstance(image, Image.Image) else image for image in given])
    rows = [_lesson_rows(backbone, lesson, [next(visuals) for _ in lesson.images]) for lesson in lessons]
    return PackedLessons([prompt for prompt, _ in rows], [siblings for _, siblings in rows], answer_weight)


def supervised_loss(engine: TorchEngine, lessons: Sequence[Lesson], answer_weight: float = 1.0) -> Tensor:
    """Weighted mean negative log-likelihood of the targets' tokens, end token included; a scalar with gradients.

    Args:
        engine: the engine of the model.
        lessons: the lessons of a batch.
        answer_weight: weight of the tokens between `<answer>` and `</answer>`; all others have weight 1. A letter is
            one token in twenty, so with equal weights it would hardly count.
    """
    return pack_lessons(engine.backbone, lessons, answer_weight).loss(engine, range(len(lessons)))


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
