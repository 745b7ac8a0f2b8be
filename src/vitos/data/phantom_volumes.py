"""Phantoms of several images: volumes with findings in a few slices, and pairs of dates with growth.

A volume is a stack of slices of the body of `data/phantom.py`. Each finding is a ball that two or three neighbouring
slices cut, each kind occurs once, and most slices show nothing: what a question needs is a few per cent of all tokens.
A pair shows one body at two dates, in which one finding has grown, shrunk or stayed.

Simplifications: the organs are the same in all slices, neighbouring slices share no noise, and distances are not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitos.core.geometry import Box
from vitos.core.record import IMAGE_PLACEHOLDER, option_lines
from vitos.data.files import write_json_atomic
from vitos.data.phantom import KINDS, SIZE, SPLIT_OFFSET, Lesion, Scene, make_scene, render

SLICES = 12
FINDINGS = (2, 3)  # findings of a volume, least and most
GROWN = 1.35  # ratio of the radii at two dates; "unchanged" is 1
CHANGES = ("grown", "shrunk", "unchanged")
Stack = tuple[Scene, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackQuestion:
    """A multiple-choice question about several slices or dates.

    Attributes:
        template: name of the kind of question.
        word: what the prompt calls an image, "Slice" or "Date".
        text: the question without images and options.
        options, truth: texts of the options, and that of the right one.
        evidence: finding and place of the image in which it is seen, from 1.
        thought: the text that the warm start teaches as the thought.
    """

    template: str
    word: str
    text: str
    options: tuple[str, ...]
    truth: str
    evidence: tuple[tuple[Lesion, int], ...]
    thought: str

    @property
    def answer(self) -> str:
        """The letter of the right option."""
        return "ABCD"[self.options.index(self.truth)]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The evidence as boxes, image by image."""
        ordered = sorted(self.evidence, key=lambda pair: pair[1])
        return tuple(replace(lesion.box, image=place) for lesion, place in ordered)

    def full_text(self, images: int) -> str:
        """The question with its numbered images and its options."""
        lead = "".join(f"{self.word} {place}: {IMAGE_PLACEHOLDER}\n" for place in range(1, images + 1))
        return f"{lead}{self.text}{option_lines(self.options)}"


# --- scenes ---------------------------------------------------------------------------------------------------------


def make_volume(rng: np.random.Generator, slices: int = SLICES, findings: tuple[int, int] = FINDINGS) -> Stack:
    """A stack of slices with findings of different kinds, each in two or three neighbouring slices.

    Args:
        findings: least and largest number of them.
    """
    count = int(rng.integers(findings[0], min(findings[1], slices - 2) + 1))
    kinds = tuple(KINDS[i] for i in rng.permutation(len(KINDS))[:count])
    whole = make_scene(rng, kinds)
    cuts: list[list[Lesion]] = [[] for _ in range(slices)]
    # Middles of different findings differ, so that "in which slice" has one answer.
    middles = rng.permutation(np.arange(1, slices - 1))[: len(whole.findings)]
    for ball, middle in zip(whole.findings, middles, strict=True):
        radius = max(ball.radius, 0.075)
        for offset in (-1, 0, 1) if rng.random() < 0.5 else (0, int(rng.choice((-1, 1)))):
            cuts[middle + offset].append(replace(ball, radius=radius if offset == 0 else 0.72 * radius))
    seeds = rng.integers(2**31, size=slices)
    return tuple(Scene(whole.organs, tuple(own), int(seed)) for own, seed in zip(cuts, seeds, strict=True))


def make_pair(rng: np.random.Generator, change: str) -> Stack:
    """One body at two dates; its first finding has changed, the others have not."""
    before = make_scene(rng)
    while not before.findings:
        before = make_scene(rng)
    factor = {"grown": GROWN, "shrunk": 1 / GROWN, "unchanged": 1.0}[change]
    first, *others = before.findings
    middle = replace(first, radius=float(rng.uniform(0.075, 0.08)))
    low, high = (middle, replace(middle, radius=middle.radius * max(factor, 1 / factor)))
    now, then = (high, low) if factor > 1 else (low, high) if factor < 1 else (middle, middle)
    rest = tuple(f for f in others if f.kind != first.kind)
    seeds = rng.integers(2**31, size=2)
    return tuple(Scene(before.organs, (one, *rest), int(seed)) for one, seed in zip((then, now), seeds, strict=True))


def found_in(stack: Stack) -> dict[str, list[tuple[Lesion, int]]]:
    """Kind → its cuts, each with the place of the image, from 1."""
    out: dict[str, list[tuple[Lesion, int]]] = {}
    for place, scene in enumerate(stack, start=1):
        for lesion in scene.findings:
            out.setdefault(lesion.kind, []).append((lesion, place))
    return out


# --- questions ------------------------------------------------------------------------------------------------------


def largest_slice(rng: np.random.Generator, slices: int = SLICES) -> tuple[Stack, StackQuestion]:
    """In which slice is a finding largest? The options hold the middles of the others as well."""
    stack = make_volume(rng, slices)
    found = found_in(stack)
    kinds = list(found)
    kind = kinds[rng.integers(len(kinds))]
    middles = {k: max(cuts, key=lambda cut: cut[0].radius)[1] for k, cuts in found.items()}
    truth, others = middles[kind], [place for k, place in middles.items() if k != kind]
    rest = [place for place in range(1, slices + 1) if place != truth and place not in others]
    wrong = [*others, *rng.permutation(rest).tolist()][:3]
    options = tuple(str(v) for v in rng.permutation([truth, *wrong]).tolist())
    return stack, StackQuestion(
        template="largest_slice",
        word="Slice",
        text=f"In which slice is the {kind} largest?",
        options=options,
        truth=str(truth),
        evidence=tuple(found[kind]),
        thought=f"it is slice {truth}",
    )


def kind_in_slice(rng: np.random.Generator, slices: int = SLICES) -> tuple[Stack, StackQuestion]:
    """What is the finding in a slice that cuts just one?"""
    while True:
        stack = make_volume(rng, slices)
        single = [place for place, scene in enumerate(stack, start=1) if len(scene.findings) == 1]
        if single:
            break
    place = single[rng.integers(len(single))]
    (lesion,) = stack[place - 1].findings
    return stack, StackQuestion(
        template="kind_in_slice",
        word="Slice",
        text=f"What is the finding in slice {place}?",
        options=tuple(rng.permutation(KINDS).tolist()),
        truth=lesion.kind,
        evidence=((lesion, place),),
        thought=f"it is a {lesion.kind}",
    )


def kind_in_volume(rng: np.random.Generator, slices: int = SLICES) -> tuple[Stack, StackQuestion]:
    """What is the only finding of a volume?"""
    stack = make_volume(rng, slices, (1, 1))
    ((kind, cuts),) = found_in(stack).items()
    return stack, StackQuestion(
        template="kind_in_volume",
        word="Slice",
        text="What is the finding in these slices?",
        options=tuple(rng.permutation(KINDS).tolist()),
        truth=kind,
        evidence=tuple(cuts),
        thought=f"it is a {kind}",
    )


def growth(rng: np.random.Generator, slices: int = 2) -> tuple[Stack, StackQuestion]:
    """Has a finding grown from the first date to the second?"""
    change = CHANGES[rng.integers(len(CHANGES))]
    stack = make_pair(rng, change)
    kind = stack[0].findings[0].kind
    return stack, StackQuestion(
        template="growth",
        word="Date",
        text=f"What has become of the {kind}?",
        options=tuple(rng.permutation(CHANGES).tolist()),
        truth=change,
        evidence=tuple((scene.findings[0], place) for place, scene in enumerate(stack, start=1)),
        thought=f"it is {change}",
    )


STACK_TEMPLATES: dict[str, Callable[[np.random.Generator, int], tuple[Stack, StackQuestion]]] = {
    "largest_slice": largest_slice,
    "kind_in_slice": kind_in_slice,
    "growth": growth,
    "kind_in_volume": kind_in_volume,
}


def stack_samples(
    split: str, count: int, seed: int = 0, *, slices: int = SLICES, templates: Sequence[str] = ()
) -> Iterator[tuple[str, Stack, StackQuestion]]:
    """`count` samples of a split, the templates in turn, as (id, stack, question).

    Raises:
        ValueError: for an unknown split or template, fewer than four slices, or seeds and counts that would run into
            the next split.
    """
    names = list(templates or STACK_TEMPLATES)
    if split not in SPLIT_OFFSET or not set(names) <= set(STACK_TEMPLATES):
        raise ValueError(f"splits are {', '.join(SPLIT_OFFSET)}, templates {', '.join(STACK_TEMPLATES)}")
    if not (0 <= seed < 1000 and 0 <= count <= 10**6 and slices >= 4):
        raise ValueError("volumes take a seed of 0..999, at most 1,000,000 samples per split and at least 4 slices")
    for index in range(count):
        name = names[index % len(names)]
        # The last number keeps the scenes apart from those of `data/phantom.py`.
        rng = np.random.default_rng(
            [SPLIT_OFFSET[split] + seed * 10**6 + index, list(STACK_TEMPLATES).index(name), 26]
        )
        stack, question = STACK_TEMPLATES[name](rng, slices)
        yield f"volumes/{split}/{seed}/{index}", stack, question


# --- files ----------------------------------------------------------------------------------------------------------


def write_volumes(
    folder: Path, split: str, count: int, seed: int = 0, *, slices: int = SLICES, size: int = SIZE
) -> Path:
    """Write a split: volumes as NIfTI, dates as PNG, and `{split}.json`, whose path is returned.

    Raises:
        FileExistsError: if the split is there already.
        ImportError: without nibabel, the `nifti` extra.
        ValueError: as `stack_samples`.
    """
    import nibabel

    path = folder / f"{split}.json"
    if path.exists():
        raise FileExistsError(f"{path} is there already; name another folder, or remove it")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for ident, stack, question in stack_samples(split, count, seed, slices=slices):
        name = f"images/{ident.replace('/', '_')}"
        pictures = [render(scene, size) for scene in stack]
        row: dict[str, Any] = {"id": ident, "answer": question.answer}
        if question.word == "Slice":
            gray = np.stack([np.asarray(picture.convert("L")).T for picture in pictures], axis=2)  # (x, y, slice)
            nibabel.save(nibabel.Nifti1Image(gray, np.eye(4)), folder / f"{name}.nii")  # type: ignore[no-untyped-call]
            # This window leaves 8-bit values as they are.
            row |= {"image_path": f"{name}.nii#axis=2&window=128,256", "slices": "all"}
            row["question"] = question.text + option_lines(question.options)
            row["bbox"] = [{"slice": box.image, "box": list(box.as_tuple())} for box in question.boxes]
        else:
            for place, picture in enumerate(pictures, start=1):
                picture.save(folder / f"{name}_{place}.png")
            row["image_path"] = [f"{name}_{place}.png" for place in range(1, len(stack) + 1)]
            row["question"] = question.full_text(len(stack))
            row["bbox"] = [box.to_json() for box in question.boxes]
        rows.append(row | {"meta": {"template": question.template, "thought": question.thought}})
    write_json_atomic(path, rows)
    return path
