"""The questions of `../shared/data`, word for word, about scenes with known findings: as many as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from nano_real.scenes import CELLS, NUCLEUS, TUMOURS, Corners, Fact, Scene, touches
from transformers import PreTrainedTokenizerBase

from vitos.core.record import option_lines

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
OFF_MIDLINE = 0.04  # a centre nearer to a midline is asked for no quadrant
SIZES = ("less than 1.1 %", "1.1 to 2.5 %", "more than 2.5 %")
COUNTS = ("3 to 8", "9 to 13", "14 to 18", "19 to 24")
WINDOW = (0.25, 1 / 3)  # width and height of the windows asked for platelets
AROUND = 0.1  # the evidence of a point reaches this far


@dataclass(frozen=True)
class Question:
    """A question with options inline; evidence in reading order.

    Attributes:
        about: what the evidence shows, for the localization branch's thought: nothing that gives the answer away.
    """

    template: str
    text: str
    truth: str
    evidence: tuple[Corners, ...]
    about: str


Template = Callable[[Scene, np.random.Generator], Question | None]


def ask(
    template: str,
    text: str,
    options: Sequence[str],
    truth: str,
    boxes: Sequence[Corners],
    about: str,
    rng: np.random.Generator,
) -> Question:
    shuffled = [options[i] for i in rng.permutation(len(options))]
    return Question(template, f"<image>{text}{option_lines(shuffled)}", truth, tuple(boxes), about)


def middle(box: Corners) -> tuple[float, float]:
    return ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


def quadrant(box: Corners) -> str | None:
    """Where a box's middle lies, or None near a midline."""
    x, y = middle(box)
    if min(abs(x - 0.5), abs(y - 0.5)) < OFF_MIDLINE:
        return None
    return f"{'lower' if y > 0.5 else 'upper'} {'right' if x > 0.5 else 'left'}"


def area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def numbers(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{v:.2f}" for v in values) + "]"


def number_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of 0.00 ... 1.00."""
    return [tokenizer.get_vocab()[f"{i / 100:.2f}"] for i in range(101)]


def overlap(one: Corners, other: Corners) -> float:
    """Intersection over union."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / (area(one) + area(other) - both)


# --- heads ----------------------------------------------------------------------------------------------------------


def only_tumour(scene: Scene) -> tuple[str, Corners] | None:
    return scene.findings[0] if scene.domain == "brain_tumor_mri" and len(scene.findings) == 1 else None


def tumour_type(scene: Scene, rng: np.random.Generator) -> Question | None:
    if (found := only_tumour(scene)) is None:
        return None
    text = (
        "This is a contrast-enhanced T1-weighted MR image of a head with a tumour. Which kind of tumour does it show?"
    )
    return ask("tumour_type", text, TUMOURS, found[0], [found[1]], "the tumour", rng)


def tumour_quadrant(scene: Scene, rng: np.random.Generator) -> Question | None:
    if (found := only_tumour(scene)) is None or (where := quadrant(found[1])) is None:
        return None
    text = "In which quadrant of the image, as displayed, does the centre of the tumour lie?"
    return ask("tumour_quadrant", text, QUADRANTS, where, [found[1]], "the tumour", rng)


def tumour_size(scene: Scene, rng: np.random.Generator) -> Question | None:
    if (found := only_tumour(scene)) is None:
        return None
    text = "About how much of the whole image area does the tumour's bounding box cover?"
    size = SIZES[int(np.digitize(area(found[1]), (0.011, 0.025)))]
    return ask("tumour_size", text, SIZES, size, [found[1]], "the tumour", rng)


def tumour_box(scene: Scene, rng: np.random.Generator, others: Sequence[Corners]) -> Question | None:
    """The other boxes are tumours of other slices.

    Options are a little off the boxes: the answer has to be copied from them, not from the evidence just written.
    """
    if (found := only_tumour(scene)) is None:
        return None
    chosen = [found[1]]
    for i in rng.permutation(len(others))[:40]:
        if len(chosen) < 4 and all(overlap(others[i], box) < 0.1 for box in chosen):
            chosen.append(others[i])
    if len(chosen) < 4:
        return None
    text = "Which box [x1, y1, x2, y2], in fractions of the image width and height, encloses the tumour?"
    options = [numbers(np.clip(np.array(box) + rng.normal(0, 0.015, 4), 0, 1)) for box in chosen]
    return ask("tumour_box", text, options, options[0], [found[1]], "the tumour", rng)


# --- blood ----------------------------------------------------------------------------------------------------------


def cell_type_at_point(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = scene.findings
    alone = [f for f in found if not any(touches(f[1], g[1]) for g in found if g[0] != f[0])]
    kinds = sorted({kind for kind, _ in alone})
    if scene.domain != "blood_cells" or not kinds:
        return None
    kind = kinds[rng.integers(len(kinds))]  # kinds are asked alike often
    same = [box for other, box in alone if other == kind]
    box = same[rng.integers(len(same))]
    x, y = middle(box)
    text = (
        f"Which kind of blood cell is centred near the point (x={x:.2f}, y={y:.2f})? The coordinates are fractions of "
        "the image width and height, measured from the top left corner."
    )
    return ask("cell_type_at_point", text, CELLS, kind, [box], "the cell", rng)


def wbc_quadrant(scene: Scene, rng: np.random.Generator) -> Question | None:
    boxes = scene.of(CELLS[1])
    if CELLS[1] not in scene.complete or len(boxes) != 1 or (where := quadrant(boxes[0])) is None:
        return None
    text = "In which quadrant of the image does the centre of the white blood cell lie?"
    return ask("wbc_quadrant", text, QUADRANTS, where, boxes, "the white blood cell", rng)


def platelet_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    boxes = scene.of(CELLS[2])
    if CELLS[2] not in scene.complete or not 1 <= len(boxes) <= 4:
        return None
    options = ("one", "two", "three or more")
    text = "How many platelets does this blood smear show?"
    return ask("platelet_count", text, options, options[min(len(boxes), 3) - 1], boxes, "the platelets", rng)


def platelet_in_window(scene: Scene, rng: np.random.Generator) -> Question | None:
    window = known_window(scene, rng)
    if window is None:
        return None
    text = (
        f"Is there a platelet inside the region {numbers(window.place)} "
        "([x1, y1, x2, y2], fractions of width and height)?"
    )
    return ask("platelet_in_window", text, ("yes", "no"), window.truth, [window.place], "the region", rng)


def known_window(scene: Scene, rng: np.random.Generator) -> Fact | None:
    """A window of the image's own questions, or a new one where all platelets are known; yes and no alike often."""
    truth = ("yes", "no")[rng.integers(2)]
    boxes = scene.of(CELLS[2])
    own = [f for f in scene.facts if f.template == "platelet_in_window" and f.truth == truth]
    if own and (rng.random() < 0.4 or CELLS[2] not in scene.complete):
        return own[rng.integers(len(own))]
    if scene.domain != "blood_cells":
        return None
    for _ in range(20):
        x, y = rng.uniform(0, 1 - WINDOW[0]), rng.uniform(0, 1 - WINDOW[1])
        if truth == "yes" and boxes:
            cx, cy = middle(boxes[rng.integers(len(boxes))])
            x = float(np.clip(cx - rng.uniform(0.15, 0.85) * WINDOW[0], 0, 1 - WINDOW[0]))
            y = float(np.clip(cy - rng.uniform(0.15, 0.85) * WINDOW[1], 0, 1 - WINDOW[1]))
        place = (x, y, x + WINDOW[0], y + WINDOW[1])
        inside = [b for b in boxes if place[0] <= b[0] and place[1] <= b[1] and b[2] <= place[2] and b[3] <= place[3]]
        if truth == "yes" and inside:
            return Fact("platelet_in_window", place, place, truth)
        if truth == "no" and CELLS[2] in scene.complete and not any(touches(place, b) for b in boxes):
            return Fact("platelet_in_window", place, place, truth)
    return None


# --- nuclei ---------------------------------------------------------------------------------------------------------


def nuclei_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    boxes = scene.of(NUCLEUS)
    if NUCLEUS not in scene.complete or not 3 <= len(boxes) <= 24:
        return None
    text = "How many cell nuclei does this microscope image show?"
    truth = COUNTS[int(np.digitize(len(boxes), (9, 14, 19)))]
    return ask("nuclei_count", text, COUNTS, truth, boxes, "the nuclei", rng)


def point_on_nucleus(scene: Scene, rng: np.random.Generator) -> Question | None:
    truth = ("yes", "no")[rng.integers(2)]
    own = [middle(f.place) for f in scene.facts if f.template == "point_on_nucleus" and f.truth == truth]
    boxes = scene.of(NUCLEUS)
    if truth == "yes":
        own += [middle(box) for box in boxes]  # nuclei are round enough
    elif NUCLEUS in scene.complete:
        points = rng.uniform(0.02, 0.98, (10, 2))
        own += [
            (x, y)
            for x, y in points
            if not any(b[0] - 0.03 < x < b[2] + 0.03 and b[1] - 0.03 < y < b[3] + 0.03 for b in boxes)
        ]
    if scene.domain != "nuclei" or not own:
        return None
    x, y = own[rng.integers(len(own))]
    text = (
        f"Does the point (x={x:.2f}, y={y:.2f}), in fractions of the image width and height from the top left corner, "
        "lie on a cell nucleus?"
    )
    around = (max(x - AROUND, 0), max(y - AROUND, 0), min(x + AROUND, 1), min(y + AROUND, 1))
    return ask("point_on_nucleus", text, ("yes", "no"), truth, [around], "the region", rng)


def largest_nucleus_quadrant(scene: Scene, rng: np.random.Generator) -> Question | None:
    own = [f.evidence for f in scene.facts if f.template == "largest_nucleus_quadrant"]
    boxes = sorted(scene.of(NUCLEUS), key=area)
    if not own and NUCLEUS in scene.complete and len(boxes) > 2 and area(boxes[-1]) > 1.25 * area(boxes[-2]):
        own = boxes[-1:]
    if not own or (where := quadrant(own[0])) is None:
        return None
    text = "In which quadrant of the image does the centre of the largest cell nucleus lie?"
    return ask("largest_nucleus_quadrant", text, QUADRANTS, where, own[:1], "the largest nucleus", rng)


def densest_quadrant(scene: Scene, rng: np.random.Generator) -> Question | None:
    own = [(f.place, f.evidence) for f in scene.facts if f.template == "densest_quadrant"]
    boxes = scene.of(NUCLEUS)
    if not own and NUCLEUS in scene.complete:
        halves = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]
        members = [[b for b in boxes if h[0] <= middle(b)[0] < h[2] and h[1] <= middle(b)[1] < h[3]] for h in halves]
        order = sorted(range(4), key=lambda i: len(members[i]))
        most, second = members[order[-1]], members[order[-2]]
        if len(most) >= 2 and len(most) > 1.4 * len(second):
            own = [(halves[order[-1]], enclosing(most))]
    if not own:
        return None
    place, evidence = own[0]
    text = "Which quadrant of the image holds the most cell nuclei (by their centres)?"
    return ask("densest_quadrant", text, QUADRANTS, str(quadrant(place)), [evidence], "the nuclei", rng)


def enclosing(boxes: Sequence[Corners]) -> Corners:
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return (min(x1), min(y1), max(x2), max(y2))


def make_templates(others: Sequence[Corners]) -> dict[str, Template]:
    """All templates by name; `others` are tumour boxes for `tumour_box` to choose from."""
    return {
        "tumour_type": tumour_type,
        "tumour_quadrant": tumour_quadrant,
        "tumour_size": tumour_size,
        "tumour_box": lambda scene, rng: tumour_box(scene, rng, others),
        "cell_type_at_point": cell_type_at_point,
        "wbc_quadrant": wbc_quadrant,
        "platelet_count": platelet_count,
        "platelet_in_window": platelet_in_window,
        "nuclei_count": nuclei_count,
        "point_on_nucleus": point_on_nucleus,
        "largest_nucleus_quadrant": largest_nucleus_quadrant,
        "densest_quadrant": densest_quadrant,
    }
