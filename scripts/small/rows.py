"""Records about a picture: the sets' own questions, the same in other words, and other kinds of questions."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nano_real.projector import domain_kinds
from nano_real.questions import QUADRANTS, Question, Template, middle, numbers, quadrant
from nano_real.scenes import CELLS, NUCLEUS, TUMOURS, Corners, Scene

from small.pictures import DISC, FUNDUS, LESIONS, SMEARS
from small.words import Words
from vitos.core.options import option_lines
from vitos.core.record import parse_options

Row = dict[str, Any]
SHAPES = (
    "normal cell", "spherocyte", "target cell", "stomatocyte", "ovalocyte", "schistocyte", "burr cell", "hypochromia",
    "macrocyte", "microcyte", "teardrop",
)  # fmt: skip
SHOWN = {
    "brain_tumor_mri": "head MR", "blood_cells": "blood smear", SMEARS: "blood smear", "nuclei": "cell nuclei",
    FUNDUS: "eye",
}  # fmt: skip
PICTURES = ("head MR", "blood smear", "cell nuclei", "eye", "chest", "abdomen")
LISTED = 6  # boxes of an answer to "where are they?"
MOST_BOXES = 24
LETTER = ("Answer with the option's letter.", "Give the letter of the right option only.", "Reply with one letter.")
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """The kinds of findings that images of this set can have."""
    if scene.domain == FUNDUS:
        return (DISC, *LESIONS)
    return SHAPES if scene.domain == SMEARS else domain_kinds(scene)


class Asker:
    """Makes records of scenes.

    Args:
        templates: the sets' own questions (`nano_real.questions.make_templates`).
        words: where names and phrasings come from.
    """

    def __init__(self, templates: dict[str, Template], words: Words) -> None:
        self.templates, self.words, self.rng = templates, words, words.rng

    def rows(self, scene: Scene) -> Iterator[Row]:
        """Records about one scene, without their image; about a dozen."""
        asked = [q for template in self.templates.values() if (q := template(scene, self.rng)) is not None]
        for i in self.rng.permutation(len(asked))[:4]:
            yield own_row(asked[i], scene)
            if self.rng.random() < 0.6 and (row := self.reworded(asked[i], scene)) is not None:
                yield row
        yield from self.points(scene, 4)
        makers: list[Callable[[Scene], Row | None]] = [
            self.place, self.present, self.find, self.count, self.central, self.picture_kind, self.caption,
        ]  # fmt: skip
        chosen = [makers[i] for i in self.rng.choice(len(makers), 4, replace=False)]
        if scene.domain in (FUNDUS, SMEARS):
            chosen += [self.present, self.place]
        for make in chosen:
            if (row := make(scene)) is not None:
                yield row

    # --- with options -----------------------------------------------------------------------------------------------

    def choose(
        self,
        template: str,
        text: str,
        concepts: Sequence[str],
        truth: str,
        boxes: Sequence[Corners],
        thought: str,
        plain: float = 0.2,
    ) -> Row:
        """A question with options, which are names of concepts in any order."""
        names = self.words.names(concepts, plain)
        if len({name.casefold() for name in names}) < len(names):
            names = list(concepts)
        order = self.rng.permutation(len(names))
        options = [names[i] for i in order]
        letter = chr(ord("A") + [concepts[i] for i in order].index(truth))
        question, form = f"<image>{text}{self._laid_out(text, options)}", "text"
        if self.rng.random() < 0.15:
            question, form = f"{question}\n{LETTER[self.rng.integers(len(LETTER))]}", "letter"
        if list(parse_options(question).values()) != options:
            question, form = f"<image>{text}{option_lines(options)}", "text"
        return _row(template, question, letter, boxes, thought, form=form)

    def _laid_out(self, text: str, options: Sequence[str]) -> str:
        style = self.rng.random()
        letters = [chr(ord("A") + i) for i in range(len(options))]
        if style < 0.1:
            return "".join(f"\n({one}) {option}" for one, option in zip(letters, options, strict=True))
        if style < 0.2:
            return "".join(f"\n{one}) {option}" for one, option in zip(letters, options, strict=True))
        return option_lines(options)

    def reworded(self, q: Question, scene: Scene) -> Row | None:
        """A question of the sets in other words, its options under other names."""
        given = re.findall(r"\d\.\d\d", q.text.partition("\n")[0])
        options = list(parse_options(q.text).values())
        key, values = _PHRASING[q.template]
        values = values | dict(zip(("x", "y"), given, strict=False)) | {"box": ", ".join(given)}
        if "thing" in values:
            values["thing"] = self.words.name(values["thing"], 0.5)
        text = self.words.phrase(key).format(**values)
        return self.choose(f"reworded_{q.template}", text, options, q.truth, q.evidence, thought_of(q, scene))

    def place(self, scene: Scene) -> Row | None:
        """Quadrant, side or height of the only finding of a kind."""
        single = [k for k in kinds_of(scene) if k in scene.complete and len(scene.of(k)) == 1]
        if not single:
            return None
        kind = single[self.rng.integers(len(single))]
        (box,) = scene.of(kind)
        x, y = middle(box)
        thing = "tumour" if kind in TUMOURS else self.words.name(kind, 0.5)
        style = self.rng.integers(3)
        if style == 0 and (where := quadrant(box)) is not None:
            key, concepts, truth = "quadrant", QUADRANTS, where
        elif style == 1 and abs(x - 0.5) > 0.04:
            key, concepts, truth = "side", ("left", "right"), "left" if x < 0.5 else "right"
        elif style == 2 and abs(y - 0.5) > 0.04:
            key, concepts, truth = "height", ("upper", "lower"), "upper" if y < 0.5 else "lower"
        else:
            return None
        text = self.words.phrase(key).format(thing=thing)
        return self.choose(f"place_{key}", text, concepts, truth, [box], f"the {kind} {at(box)}")

    def present(self, scene: Scene) -> Row | None:
        """Is a kind there? Half of the answers are yes, where that can be."""
        known = [k for k in kinds_of(scene) if k in scene.complete]
        there = [k for k in known if scene.of(k)]
        absent = [k for k in known if not scene.of(k)]
        absent += [k for k in (*TUMOURS, *CELLS, DISC) if k not in kinds_of(scene)] if self.rng.random() < 0.3 else []
        truth = self.rng.random() < 0.5
        pool = there if truth else absent
        if not pool:
            return None
        kind = pool[self.rng.integers(len(pool))]
        boxes = scene.of(kind)[:LISTED]
        thought = f"{a(kind)} {at(boxes[0])}" if truth else f"no {kind}"
        text = self.words.phrase("present").format(thing=self.words.name(kind, 0.4))
        if self.rng.random() < 0.3:
            return _row("present_open", f"<image>{text}", "yes" if truth else "no", boxes, thought, kind="word")
        return self.choose("present", text, ("yes", "no"), "yes" if truth else "no", boxes, thought, plain=0.4)

    def picture_kind(self, scene: Scene) -> Row:
        return self.picture_row(SHOWN[scene.domain])

    def picture_row(self, truth: str) -> Row:
        others = [p for p in PICTURES if p != truth]
        concepts = [truth, *(others[i] for i in self.rng.permutation(len(others))[: self.rng.integers(1, 4)])]
        return self.choose("modality", self.words.phrase("modality"), concepts, truth, [], f"a picture: {truth}")

    # --- what is there? ---------------------------------------------------------------------------------------------

    def points(self, scene: Scene, count: int) -> Iterator[Row]:
        """What is at a point, with options or without; kinds are asked alike often, and where there is nothing."""
        for (x, y), kind, box in places(scene, self.rng, count):
            text = self.words.phrase("at_point").format(x=f"{x:.2f}", y=f"{y:.2f}")
            boxes, thought = [] if box is None else [box], kind if kind == "nothing" else a(kind)
            if self.rng.random() < 0.4:
                yield _row("at_point_open", f"<image>{text}", f"{thought}", boxes, thought, kind="text")
                continue
            others = [k for k in (*kinds_of(scene), "nothing") if k != kind]
            if self.rng.random() < 0.15:  # options of other images
                others = [k for k in (*TUMOURS, *CELLS, *LESIONS, DISC, NUCLEUS) if k not in kinds_of(scene)]
            some = [others[i] for i in self.rng.permutation(len(others))[: self.rng.integers(1, 4)]]
            yield self.choose("at_point", text, [kind, *some], kind, boxes, thought)

    def central(self, scene: Scene) -> Row | None:
        """What is in the middle: a sentence."""
        over = [(k, b) for k, b in scene.findings if b[0] < 0.5 < b[2] and b[1] < 0.5 < b[3]]
        if not over:
            return None
        kind, box = over[-1]
        return _row(
            "middle", f"<image>{self.words.phrase('middle')}", f"It is {a(kind)}.", [box], a(kind), kind="text"
        )

    # --- where, how many, all of it ---------------------------------------------------------------------------------

    def find(self, scene: Scene) -> Row | None:
        known = [k for k in kinds_of(scene) if k in scene.complete and 1 <= len(scene.of(k)) <= LISTED]
        if not known:
            return None
        kind = known[self.rng.integers(len(known))]
        boxes = scene.of(kind)
        answer = _where(boxes[0]) if len(boxes) == 1 else f"{NUMBER_WORDS[len(boxes)]} places"
        text = self.words.phrase("find").format(thing=self.words.name(kind, 0.6))
        return _row("find", f"<image>{text}", answer, boxes, f"the {kind} {at(boxes[0])}", kind="text")

    def count(self, scene: Scene) -> Row | None:
        known = [k for k in kinds_of(scene) if k in scene.complete and len(scene.of(k)) <= LISTED and k not in LESIONS]
        if not known or scene.domain == "brain_tumor_mri":
            return None
        kind = known[self.rng.integers(len(known))]
        boxes = scene.of(kind)
        text = self.words.phrase("count").format(thing=self.words.name(kind, 0.6))
        return _row("count", f"<image>{text}", str(len(boxes)), boxes, f"{NUMBER_WORDS[len(boxes)]}", kind="text")

    def caption(self, scene: Scene) -> Row:
        said = []
        for kind in kinds_of(scene):
            boxes = scene.of(kind)
            if boxes and len(boxes) <= LISTED and kind in scene.complete:
                more = f"{NUMBER_WORDS[len(boxes)]} {kind}{'' if kind[-1] in 'sa' else 's'}"
                said.append(f"{a(kind) if len(boxes) == 1 else more} {_where(boxes[0])}")
            elif boxes:
                said.append(f"several {kind}{'' if kind[-1] in 'sa' else 's'}")
        shown = SHOWN[scene.domain]
        told = f"A picture: {shown}" + (f", with {' and '.join(said[:4])}." if said else ".")
        return _row("caption", f"<image>{self.words.phrase('caption')}", told, [], shown, kind="text")


# --- the sets' own questions ----------------------------------------------------------------------------------------

_PHRASING: dict[str, tuple[str, dict[str, str]]] = {
    "tumour_type": ("tumour_type", {}),
    "tumour_quadrant": ("quadrant", {"thing": "tumour"}),
    "tumour_size": ("tumour_size", {}),
    "tumour_box": ("tumour_box", {}),
    "cell_type_at_point": ("at_point", {}),
    "wbc_quadrant": ("quadrant", {"thing": CELLS[1]}),
    "platelet_count": ("platelet_count", {}),
    "platelet_in_window": ("in_region", {"thing": CELLS[2]}),
    "nuclei_count": ("nuclei_count", {}),
    "point_on_nucleus": ("on_nucleus", {}),
    "largest_nucleus_quadrant": ("quadrant", {"thing": "largest nucleus"}),
    "densest_quadrant": ("quadrant", {"thing": "largest number of nuclei"}),
}


def own_row(q: Question, scene: Scene) -> Row:
    """A question of the sets, word for word."""
    options = parse_options(q.text)
    letter = next(letter for letter, text in options.items() if text == q.truth)
    return _row(q.template, q.text, letter, q.evidence, thought_of(q, scene))


def thought_of(q: Question, scene: Scene) -> str:
    """A few words that name what is seen, from which the answer follows."""
    box = q.evidence[0]
    if q.template in ("tumour_type", "cell_type_at_point"):
        return a(q.truth)
    if q.template == "tumour_size":
        return f"{box[2] - box[0]:.2f} wide, {box[3] - box[1]:.2f} high"
    if q.template == "tumour_box":
        return f"the tumour {numbers(box)}"
    if q.template == "platelet_in_window":
        inside = [
            b for b in scene.of(CELLS[2]) if box[0] <= middle(b)[0] <= box[2] and box[1] <= middle(b)[1] <= box[3]
        ]
        return "no platelet there" if q.truth == "no" else f"a platelet {at(inside[0])}" if inside else "a platelet"
    if q.template == "point_on_nucleus":
        return "a nucleus" if q.truth == "yes" else "nothing"
    if q.template in ("nuclei_count", "platelet_count"):
        return f"{len(q.evidence)} {'nuclei' if q.template[0] == 'n' else 'platelets'}"
    return f"{q.about} {at(box)}"


def places(
    scene: Scene, rng: np.random.Generator, count: int
) -> Iterator[tuple[tuple[float, float], str, Corners | None]]:
    """Points, the kind there (or "nothing"), and its box."""
    kinds = sorted({kind for kind, _ in scene.findings})
    complete = (
        set(kinds_of(scene)) <= scene.complete and scene.domain != FUNDUS
    )  # what no lesion's box covers may be one
    for _ in range(count):
        if complete and rng.random() < 0.25:
            x, y = rng.uniform(0.03, 0.97, 2)
            if not any(b[0] - 0.04 < x < b[2] + 0.04 and b[1] - 0.04 < y < b[3] + 0.04 for _, b in scene.findings):
                yield (float(x), float(y)), "nothing", None
            continue
        if not kinds:
            continue
        kind = kinds[rng.integers(len(kinds))]
        own = scene.of(kind)
        box = own[rng.integers(len(own))]
        size = np.array([box[2] - box[0], box[3] - box[1]])
        x, y = np.clip(np.array(middle(box)) + 0.12 * size * rng.normal(0, 1, 2), 0.01, 0.99)
        if not any(k != kind and b[0] < x < b[2] and b[1] < y < b[3] for k, b in scene.findings):
            yield (float(x), float(y)), kind, box


def a(kind: str) -> str:
    """A kind with its article."""
    return kind if kind[-1] in "sa" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def at(box: Corners) -> str:
    x, y = middle(box)
    return f"at ({x:.2f}, {y:.2f})"


def _where(box: Corners) -> str:
    x, y = middle(box)
    if abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1:
        return "in the middle"
    return f"in the {'lower' if y > 0.5 else 'upper'} {'right' if x > 0.5 else 'left'}"


def _row(
    template: str,
    question: str,
    answer: str,
    boxes: Sequence[Corners],
    thought: str,
    form: str = "text",
    kind: str = "letter",
) -> Row:
    row: Row = {"question": question, "answer": answer, "kind": kind}
    kept = [[round(v, 4) for v in b] for b in boxes if b[2] - b[0] > 0.002 and b[3] - b[1] > 0.002]
    if kept and len(kept) <= MOST_BOXES:
        row["bbox"] = kept
    return row | {"meta": {"template": template, "thought": thought, "form": form}}


# --- radiology, questions by people ---------------------------------------------------------------------------------


def radiology(folder: Path, asker: Asker) -> dict[str, list[Row]]:
    """Questions of VQA-RAD's train part about images that are not held out, by image; open ones also with options."""
    held_out = set(json.loads((folder / "heldout_images.json").read_text(encoding="utf-8")))
    rows = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["image"].rpartition("/")[2] not in held_out]
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["answer_type"] == "OPEN":
            answers[row["question_type"]].add(str(row["answer"]).strip().lower())
    out: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        text, truth = row["question"].strip(), str(row["answer"]).strip().lower()
        if not truth or len(truth) > 40:
            continue
        others = sorted(answers[row["question_type"]] - {truth})
        if truth in ("yes", "no") and asker.rng.random() < 0.6:
            made = asker.choose("radiology", text, ("yes", "no"), truth, [], truth, plain=0.5)
        elif row["answer_type"] == "OPEN" and len(others) >= 3 and asker.rng.random() < 0.6:
            some = [others[i] for i in asker.rng.permutation(len(others))[: asker.rng.integers(1, 4)]]
            made = asker.choose("radiology", text, [truth, *some], truth, [], truth)
        else:
            made = _row(
                "radiology_open", f"<image>{text}", truth, [], truth, kind="word" if truth in ("yes", "no") else "text"
            )
        out[row["image"]].append(made)
        out[row["image"]] += [asker.picture_row(_RADIOLOGY[row["organ"]])] if asker.rng.random() < 0.15 else []
    return out


_RADIOLOGY = {"CHEST": "chest", "HEAD": "head", "ABD": "abdomen"}
