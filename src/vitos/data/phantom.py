"""Phantoms: seeded synthetic slices with findings, and boxed multiple-choice questions about them.

A scene is a body with four organs, tissue texture, vessels (distractors) and a few findings of four kinds. Every
question can be answered from a few per cent of the image. Neither its text nor its letters help: kinds, places and
counts are drawn evenly, and options are shuffled. A scene is made for the template of its question, so that counts,
for example, are even by construction.

Simplifications: one slice, one body plan, "left" is the image's left, findings do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from vitos.core.geometry import Box
from vitos.core.record import IMAGE_PLACEHOLDER, AnswerKind, option_lines
from vitos.data.files import write_json_atomic
from vitos.data.phantom_files import IMAGES, PhantomSettings, image_name, refuse_changed, refuse_others, remove_orphans

KINDS = ("nodule", "cyst", "calcification", "mass")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
SIZE = 128
# What the answer is where a question is asked without its options.
IN_WORDS: dict[str, AnswerKind] = {
    "kind_at_point": "text",
    "kind_in_region": "text",
    "which_quadrant": "text",
    "how_many": "number",
    "larger_of_two": "word",
}
# Seeds of the splits start this far apart: no two splits can share a scene.
SPLIT_OFFSET = {"train": 0, "val": 10**9, "test": 2 * 10**9}


@dataclass(frozen=True, slots=True)
class Organ:
    """An ellipse with a name; centre and half-axes in fractions of the image."""

    name: str
    x: float
    y: float
    rx: float
    ry: float
    shade: float

    def contains(self, x: float, y: float, scale: float = 1.0) -> bool:
        return ((x - self.x) / self.rx) ** 2 + ((y - self.y) / self.ry) ** 2 < scale


@dataclass(frozen=True, slots=True)
class Lesion:
    """A lesion (the questions say "finding"): its kind, and its centre and radius in fractions of the image."""

    kind: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        """Its bounding box, rounded to two decimals as annotators write them."""
        r = self.radius
        x1, y1 = (round(max(0.0, v - r), 2) for v in (self.x, self.y))
        x2, y2 = (round(min(1.0, v + r), 2) for v in (self.x, self.y))
        return Box(x1, y1, x2, y2)

    @property
    def quadrant(self) -> str:
        return f"{'upper' if self.y < 0.5 else 'lower'} {'left' if self.x < 0.5 else 'right'}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn image: what is where. `render` makes the picture; its texture and noise come from `texture_seed`."""

    organs: tuple[Organ, ...]
    findings: tuple[Lesion, ...]
    texture_seed: int


@dataclass(frozen=True, slots=True)
class PhantomQuestion:
    """A multiple-choice question: `truth` is the text of the right option, `evidence` what it is about."""

    template: str
    text: str
    options: tuple[str, ...]
    truth: str
    evidence: tuple[Lesion, ...]
    thought: str

    @property
    def answer(self) -> str:
        return "ABCD"[self.options.index(self.truth)]

    @property
    def full_text(self) -> str:
        """The question as a record has it: `<image>`, the text, one option per line."""
        return f"{IMAGE_PLACEHOLDER}{self.text}{option_lines(self.options)}"


# --- scenes ---------------------------------------------------------------------------------------------------------


def make_scene(rng: np.random.Generator, kinds: tuple[str, ...] | None = None) -> Scene:
    """Draw one scene.

    Args:
        rng: source of all randomness.
        kinds: kinds of the findings; by default two to five, drawn evenly. A finding without a free place is left out.
    """
    if kinds is None:
        kinds = tuple(KINDS[i] for i in rng.integers(len(KINDS), size=rng.integers(2, 6)))
    return Scene(_draw_organs(rng), _place(rng, kinds), int(rng.integers(2**31)))


def _draw_organs(rng: np.random.Generator) -> tuple[Organ, ...]:
    plan = (
        ("left lung", 0.30, 0.34, 0.15, 0.20, -0.17),
        ("right lung", 0.70, 0.34, 0.15, 0.20, -0.17),
        ("liver", 0.33, 0.72, 0.17, 0.13, 0.10),
        ("spleen", 0.68, 0.72, 0.13, 0.12, 0.06),
    )
    jitter = rng.uniform(-0.02, 0.02, (len(plan), 4))
    return tuple(
        Organ(name, x + d[0], y + d[1], rx + d[2], ry + d[3], shade)
        for (name, x, y, rx, ry, shade), d in zip(plan, jitter, strict=True)
    )


def _place(rng: np.random.Generator, kinds: tuple[str, ...]) -> tuple[Lesion, ...]:
    """Non-overlapping places inside the body, away from the midlines, so that "upper left" is never in doubt."""
    out: list[Lesion] = []
    for kind in kinds:
        for _ in range(100):
            x, y, r = rng.uniform(0.14, 0.86), rng.uniform(0.14, 0.86), rng.uniform(0.055, 0.11)
            inside = ((x - 0.5) / 0.44) ** 2 + ((y - 0.5) / 0.46) ** 2 < 0.78
            clear = all(np.hypot(x - f.x, y - f.y) > r + f.radius + 0.03 for f in out)
            if inside and clear and abs(x - 0.5) > 0.04 and abs(y - 0.5) > 0.04:
                out.append(Lesion(kind, float(x), float(y), float(r)))
                break
    return tuple(out)


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """The scene as a grey RGB image of `size` x `size` pixels."""
    rng = np.random.default_rng(scene.texture_seed)
    yy, xx = (np.mgrid[0:size, 0:size] + 0.5) / size
    image = np.full((size, size), 0.06)
    body = ((xx - 0.5) / 0.46) ** 2 + ((yy - 0.5) / 0.48) ** 2 < 1
    image[body] = 0.40
    for organ in scene.organs:
        image[((xx - organ.x) / organ.rx) ** 2 + ((yy - organ.y) / organ.ry) ** 2 < 1] += organ.shade
    texture = gaussian_filter(rng.normal(0, 1, (size, size)), size / 20)
    image += np.where(body, 0.05 * texture / texture.std(), 0)
    for _ in range(rng.integers(2, 5)):
        image += _vessel(rng, xx, yy)
    for finding in scene.findings:
        image += rng.uniform(0.22, 0.42) * _stamp(rng, finding, xx, yy)
    image = gaussian_filter(image, rng.uniform(0.4, 0.8)) + rng.normal(0, 0.035, image.shape)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _vessel(rng: np.random.Generator, xx: NDArray[np.float64], yy: NDArray[np.float64]) -> NDArray[np.float64]:
    """A thin bright curve: a distractor that is no finding."""
    angle, offset, bend = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3), rng.uniform(-0.6, 0.6)
    along = (xx - 0.5) * np.cos(angle) + (yy - 0.5) * np.sin(angle)
    across = -(xx - 0.5) * np.sin(angle) + (yy - 0.5) * np.cos(angle)
    near = np.abs(across - offset - bend * along**2) < 0.008
    return np.where(near & (np.abs(along) < 0.3), 0.14, 0.0)


def _stamp(
    rng: np.random.Generator, finding: Lesion, xx: NDArray[np.float64], yy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The finding's profile, 0..1.6, non-zero within its radius only."""
    r = finding.radius
    distance = np.hypot(xx - finding.x, yy - finding.y)
    if finding.kind == "nodule":
        return np.where(distance < r, 1.0, 0.0)
    if finding.kind == "cyst":
        return np.where(distance < r, np.where(distance > 0.62 * r, 1.1, -0.45), 0.0)
    if finding.kind == "calcification":
        out = np.zeros_like(xx)
        # One speck on each side of the box, so that the box is the box of what can be seen.
        angles = [0, np.pi / 2, np.pi, 3 * np.pi / 2, *rng.uniform(0, 2 * np.pi, 5)]
        radii = [0.86 * r] * 4 + list(rng.uniform(0, 0.8 * r, 5))
        for angle, rho in zip(angles, radii, strict=True):
            near = np.hypot(xx - finding.x - rho * np.cos(angle), yy - finding.y - rho * np.sin(angle))
            out = np.maximum(out, np.where(near < 0.014, 1.6, 0.0))
        return out
    if finding.kind == "mass":
        theta = np.arctan2(yy - finding.y, xx - finding.x)
        return np.where(distance < r * (0.62 + 0.38 * np.cos(7 * theta)), 1.1, 0.0)
    raise ValueError(f"unknown kind of finding {finding.kind!r}; expected one of {KINDS}")


# --- questions ------------------------------------------------------------------------------------------------------


def kind_at_point(scene: Scene, rng: np.random.Generator) -> PhantomQuestion | None:
    """What is the finding near a point?"""
    target = _pick(rng, scene.findings)
    if target is None:
        return None
    x, y = (round(float(np.clip(v + rng.uniform(-0.02, 0.02), 0, 1)), 2) for v in (target.x, target.y))
    return _kind_question("kind_at_point", f"What is the finding near the point ({x:.2f}, {y:.2f})?", target, rng)


def kind_in_region(scene: Scene, rng: np.random.Generator) -> PhantomQuestion | None:
    """What is the finding in an organ that holds the centre of exactly one, with no other near its border?"""
    homes = [(organ, [f for f in scene.findings if organ.contains(f.x, f.y, scale=1.7)]) for organ in scene.organs]
    single = [(organ, near[0]) for organ, near in homes if len(near) == 1 and organ.contains(near[0].x, near[0].y)]
    if not single:
        return None
    organ, target = single[rng.integers(len(single))]
    return _kind_question("kind_in_region", f"What is the finding in the {organ.name}?", target, rng)


def which_quadrant(scene: Scene, rng: np.random.Generator) -> PhantomQuestion | None:
    """Where is the only finding of a kind?"""
    target = _pick(rng, _singles(scene))
    if target is None:
        return None
    options = _shuffled(QUADRANTS, rng)
    text = f"In which quadrant is the {target.kind}?"
    return PhantomQuestion("which_quadrant", text, options, target.quadrant, (target,), f"it is {target.quadrant}")


def how_many(scene: Scene, rng: np.random.Generator) -> PhantomQuestion | None:
    """How many findings of the first finding's kind? `sample` makes the scene, so 1 to 4 are equally frequent."""
    kind = scene.findings[0].kind if scene.findings else ""
    found = tuple(f for f in scene.findings if f.kind == kind)
    if not 1 <= len(found) <= 4:
        return None
    truth = str(len(found))
    options = _shuffled(("1", "2", "3", "4"), rng)
    return PhantomQuestion(
        "how_many", f"How many findings of kind {kind}?", options, truth, found, f"there are {truth}"
    )


def larger_of_two(scene: Scene, rng: np.random.Generator) -> PhantomQuestion | None:
    """Which of two findings, the only ones of their kinds, is larger (by a fifth at least)?"""
    singles = _singles(scene)
    pairs = [
        (a, b)
        for a in singles
        for b in singles
        if a.kind != b.kind and max(a.radius, b.radius) > 1.2 * min(a.radius, b.radius)
    ]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    truth = (a if a.radius > b.radius else b).kind
    text = f"Which is larger, the {a.kind} or the {b.kind}?"
    return PhantomQuestion(
        "larger_of_two", text, _shuffled((a.kind, b.kind), rng), truth, (a, b), f"it is the {truth}"
    )


TEMPLATES: dict[str, Callable[[Scene, np.random.Generator], PhantomQuestion | None]] = {
    "kind_at_point": kind_at_point,
    "kind_in_region": kind_in_region,
    "which_quadrant": which_quadrant,
    "how_many": how_many,
    "larger_of_two": larger_of_two,
}


def _kind_question(template: str, text: str, target: Lesion, rng: np.random.Generator) -> PhantomQuestion:
    return PhantomQuestion(template, text, _shuffled(KINDS, rng), target.kind, (target,), f"it is a {target.kind}")


def _singles(scene: Scene) -> list[Lesion]:
    """Findings that are the only ones of their kind."""
    kinds = [f.kind for f in scene.findings]
    return [f for f in scene.findings if kinds.count(f.kind) == 1]


def _pick(rng: np.random.Generator, findings: list[Lesion] | tuple[Lesion, ...]) -> Lesion | None:
    return findings[rng.integers(len(findings))] if len(findings) else None


def _shuffled(options: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(options[i] for i in rng.permutation(len(options)))


# --- samples and data sets ------------------------------------------------------------------------------------------


def sample(seed: int, template: str) -> tuple[Scene, PhantomQuestion]:
    """The scene and question of a template for a seed; a scene that cannot carry the question is drawn again."""
    rng = np.random.default_rng([seed, list(TEMPLATES).index(template)])
    # The count is drawn once: drawing it with each scene would favour the counts that fit in more easily.
    kind, count = KINDS[rng.integers(len(KINDS))], int(rng.integers(1, 5))
    others = [k for k in KINDS if k != kind]
    while True:
        kinds = None
        if template == "how_many":
            kinds = (kind,) * count + tuple(others[i] for i in rng.integers(3, size=rng.integers(1, 3)))
        scene = make_scene(rng, kinds)
        question = TEMPLATES[template](scene, rng)
        if question is not None and (kinds is None or len(scene.findings) == len(kinds)):
            return scene, question


def samples(split: str, count: int, seed: int = 0) -> Iterator[tuple[str, Scene, PhantomQuestion]]:
    """`count` samples of a split, the templates in turn, as (id, scene, question).

    Raises:
        ValueError: for an unknown split, or seeds and counts that would run into the next split.
    """
    if split not in SPLIT_OFFSET:
        raise ValueError(f"unknown split {split!r}; expected one of {sorted(SPLIT_OFFSET)}")
    if not (0 <= seed < 1000 and 0 <= count <= 10**6):
        raise ValueError("phantoms take a seed of 0..999 and at most 1,000,000 samples per split")
    names = list(TEMPLATES)
    for index in range(count):
        scene, question = sample(SPLIT_OFFSET[split] + seed * 10**6 + index, names[index % len(names)])
        yield f"{split}/{seed}/{index}", scene, question


def write_phantoms(
    folder: Path,
    split: str,
    count: int,
    seed: int = 0,
    size: int = SIZE,
    *,
    overwrite: bool = False,
    in_words: bool = False,
) -> Path:
    """Write a split as PNG images and `{split}.json` in the record format; return the JSON file's path.

    The JSON is written last and atomically: where it exists, all its images do. Images of the split that are left from
    an earlier writing are removed.

    Args:
        size: pixels per side; scenes, questions and boxes are the same for all.
        overwrite: replace a split that was made with other settings, or changed since.
        in_words: ask the same questions without options, for a text, a word or a number.

    Raises:
        FileExistsError: if there is such a split and `overwrite` is False; nothing was written then.
        ValueError: from `samples`.
    """
    path = folder / f"{split}.json"
    if not overwrite:
        refuse_others(folder, {split: PhantomSettings(count, seed, size)})
    drawn = list(samples(split, count, seed))
    row = _row_in_words if in_words else _row
    rows = [row(ident, question) for ident, _, question in drawn]
    if not overwrite:
        refuse_changed(path, rows)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # or a kill from here on would leave it with images of another size
    for ident, scene, _ in drawn:
        render(scene, size).save(folder / image_name(ident))
    write_json_atomic(path, rows)
    remove_orphans(folder, split, [image_name(ident) for ident, _, _ in drawn])
    return path


def _row(ident: str, question: PhantomQuestion) -> dict[str, object]:
    return {
        "id": ident,
        "image_path": [image_name(ident)],
        "question": question.full_text,
        "answer": question.answer,
        "bbox": [list(f.box.as_tuple()) for f in question.evidence],
        "meta": {"template": question.template, "thought": question.thought},
    }


def _row_in_words(ident: str, question: PhantomQuestion) -> dict[str, object]:
    asked = {"question": f"{IMAGE_PLACEHOLDER}{question.text}", "answer": question.truth}
    return _row(ident, question) | asked | {"kind": IN_WORDS[question.template]}
