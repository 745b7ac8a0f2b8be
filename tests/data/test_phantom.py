"""Phantoms: reproducible, disjoint, right, even, and nothing to be had from text alone."""

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from vitos.data.phantom import (
    KINDS,
    QUADRANTS,
    SPLIT_OFFSET,
    TEMPLATES,
    Lesion,
    Scene,
    make_scene,
    render,
    sample,
    samples,
    write_phantoms,
)
from vitos.data.readers import read_records

CHANCE = {"kind_at_point": 4, "kind_in_region": 4, "which_quadrant": 4, "how_many": 4, "larger_of_two": 2}


@pytest.fixture(scope="module")
def drawn():
    """Two thousand questions with their scenes, 400 of every template."""
    return [(scene, question) for _, scene, question in samples("train", 2000)]


def pixels(scene):
    return hashlib.sha256(np.asarray(render(scene)).tobytes()).hexdigest()


# --- seeds and splits -----------------------------------------------------------------------------------------------


def test_a_seed_decides_everything():
    for template in TEMPLATES:
        (scene, question), (again, same) = sample(7, template), sample(7, template)
        assert (scene, question) == (again, same)
        assert pixels(scene) == pixels(again)
        assert sample(8, template) != (scene, question)


def test_one_seed_makes_other_scenes_for_other_templates():
    assert len({sample(7, template)[0] for template in TEMPLATES}) == len(TEMPLATES)


def test_splits_and_seeds_share_no_image():
    images = [
        pixels(scene) for split in SPLIT_OFFSET for seed in (0, 1) for _, scene, _ in samples(split, 10, seed=seed)
    ]
    assert len(set(images)) == len(images) == 60
    scenes = [scene for split in SPLIT_OFFSET for _, scene, _ in samples(split, 200)]
    assert len(set(scenes)) == 600


def test_ids_and_prefixes():
    """A longer split starts with the shorter one."""
    long, short = list(samples("val", 12, seed=3)), list(samples("val", 5, seed=3))
    assert long[:5] == short
    assert [ident for ident, _, _ in short] == [f"val/3/{k}" for k in range(5)]
    assert [q.template for _, _, q in long] == (list(TEMPLATES) * 3)[:12]


@pytest.mark.parametrize("wrong", [("dev", 1, 0), ("train", -1, 0), ("train", 1, 1000), ("train", 10**6 + 1, 0)])
def test_what_would_run_into_another_split_is_refused(wrong):
    with pytest.raises(ValueError, match=r"unknown split|seed of 0\.\.999"):
        list(samples(*wrong))


# --- answers --------------------------------------------------------------------------------------------------------


def solve(scene, text):
    """The answer by reading the question as a person would, and its evidence."""
    findings = list(scene.findings)
    if match := re.fullmatch(r"What is the finding near the point \((\d\.\d\d), (\d\.\d\d)\)\?", text):
        x, y = map(float, match.groups())
        ordered = sorted(findings, key=lambda f: (f.x - x) ** 2 + (f.y - y) ** 2)
        assert np.hypot(ordered[0].x - x, ordered[0].y - y) < ordered[0].radius  # the point lies in it
        return ordered[0].kind, {ordered[0]}
    if match := re.fullmatch(r"What is the finding in the (.+)\?", text):
        (organ,) = (o for o in scene.organs if o.name == match[1])
        (inside,) = (f for f in findings if ((f.x - organ.x) / organ.rx) ** 2 + ((f.y - organ.y) / organ.ry) ** 2 < 1)
        return inside.kind, {inside}
    if match := re.fullmatch(r"In which quadrant is the (\w+)\?", text):
        (only,) = (f for f in findings if f.kind == match[1])
        return ("upper " if only.y < 0.5 else "lower ") + ("left" if only.x < 0.5 else "right"), {only}
    if match := re.fullmatch(r"How many findings of kind (\w+)\?", text):
        those = {f for f in findings if f.kind == match[1]}
        return str(len(those)), those
    match = re.fullmatch(r"Which is larger, the (\w+) or the (\w+)\?", text)
    (one,), (other,) = ([f for f in findings if f.kind == kind] for kind in match.groups())
    assert max(one.radius, other.radius) > 1.2 * min(one.radius, other.radius)
    return max(one, other, key=lambda f: f.radius).kind, {one, other}


def test_answers_and_evidence_are_right(drawn):
    for scene, question in drawn:
        truth, evidence = solve(scene, question.text)
        assert (question.truth, set(question.evidence)) == (truth, evidence)
        assert question.options[ord(question.answer) - ord("A")] == truth
        assert len(set(question.options)) == len(question.options) == CHANCE[question.template]
        assert truth in question.thought


def test_findings_lie_apart_inside_the_body_and_off_the_midlines(drawn):
    for scene, _ in drawn:
        for index, f in enumerate(scene.findings):
            assert ((f.x - 0.5) / 0.46) ** 2 + ((f.y - 0.5) / 0.48) ** 2 < 1
            assert min(abs(f.x - 0.5), abs(f.y - 0.5)) > 0.03
            for g in scene.findings[:index]:
                assert np.hypot(f.x - g.x, f.y - g.y) > f.radius + g.radius


@pytest.mark.parametrize("kind", KINDS)
def test_box_is_the_box_of_what_can_be_seen(kind):
    """Two renderings that differ in one finding's place only, all noise alike."""
    scene = make_scene(np.random.default_rng(1))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        finding = Lesion(kind, *rng.uniform(0.3, 0.7, 2).tolist(), float(rng.uniform(0.06, 0.11)))
        seen, gone = (
            np.asarray(render(Scene(scene.organs, (f,), seed))).astype(int)[..., 0]
            for f in (finding, Lesion(kind, 9.0, 9.0, finding.radius))
        )
        rows, cols = np.nonzero(abs(seen - gone) > 20)
        visible = (cols.min() / 128, rows.min() / 128, (cols.max() + 1) / 128, (rows.max() + 1) / 128)
        assert np.abs(np.array(visible) - finding.box.as_tuple()).max() < 0.025


def test_evidence_is_a_few_per_cent_of_the_image(drawn):
    areas = [sum(f.box.area for f in question.evidence) for _, question in drawn]
    assert 0.02 < np.mean(areas) < 0.06
    assert np.max(areas) < 0.2


# --- nothing from text alone ----------------------------------------------------------------------------------------


def even(counts, choices, floor=1e-3):
    """Whether counts over `choices` are those of an even draw."""
    return chisquare([counts[choice] for choice in choices]).pvalue > floor


def test_letters_and_truths_are_even(drawn):
    letters, truths = defaultdict(Counter), defaultdict(Counter)
    for _, question in drawn:
        letters[question.template][question.answer] += 1
        truths[question.template][question.truth] += 1
    for template, choices in CHANCE.items():
        assert even(letters[template], "ABCD"[:choices]), (template, letters[template])
    for template in ("kind_at_point", "kind_in_region", "larger_of_two"):
        assert even(truths[template], KINDS), (template, truths[template])
    assert even(truths["which_quadrant"], QUADRANTS)
    assert even(truths["how_many"], "1234")


def test_options_come_in_every_order(drawn):
    orders = defaultdict(set)
    for _, question in drawn:
        orders[question.template].add(question.options)
    # 400 draws of 24 orders leave one out once in a million; two kinds are one of twelve ordered pairs.
    assert {template: len(seen) for template, seen in orders.items()} == dict.fromkeys(CHANCE, 24) | {
        "larger_of_two": 12
    }


def test_text_alone_stays_at_chance(drawn):
    """Tables of the most frequent answer by what the text says, learned on one split, tried on another."""

    def place(point):
        x, y = map(float, point.groups())
        return f"{int(3 * x)}{int(3 * y)}"  # a coarse place, so that it comes up again

    def said(question):
        return re.sub(r"\((\d\.\d\d), (\d\.\d\d)\)", place, question.text)

    guesses = {
        "truth by template": lambda q: (q.template, q.truth),
        "truth by text": lambda q: (said(q), q.truth),
        "letter by template": lambda q: (q.template, q.answer),
        "letter by text": lambda q: (said(q), q.answer),
        "truth by first option": lambda q: (q.template + q.options[0], q.truth),
        "letter by first option": lambda q: (said(q) + q.options[0], q.answer),
    }
    seen, new = ([q for _, q in drawn], [q for _, _, q in samples("val", 2000)])
    for name, view in guesses.items():
        table = defaultdict(Counter)
        for question in seen:
            clue, answer = view(question)
            table[clue][answer] += 1
        for template, choices in CHANCE.items():
            asked = [view(q) for q in new if q.template == template]
            right = sum(bool(table[clue]) and table[clue].most_common(1)[0][0] == answer for clue, answer in asked)
            # Four standard deviations of guessing above chance.
            limit = 1 / choices + 4 * np.sqrt((choices - 1) / choices**2 / len(asked))
            assert right / len(asked) < limit, f"{name}, {template}: {right / len(asked):.3f}"


# --- files ----------------------------------------------------------------------------------------------------------


def test_written_phantoms_are_records(tmp_path):
    path = write_phantoms(tmp_path / "data", "test", 10, seed=2)
    records = read_records(tmp_path / "data", split="test")
    assert path.name == "test.json"
    for record, (ident, scene, question) in zip(records, samples("test", 10, seed=2), strict=True):
        assert (record.id, record.answer, record.question) == (ident, question.answer, question.full_text)
        assert record.options == dict(zip("ABCD", question.options, strict=False))
        assert record.options[record.answer] == solve(scene, question.text)[0]
        assert record.boxes == tuple(f.box for f in question.evidence)
        assert record.meta == {"template": question.template, "thought": question.thought}
        (file,) = record.image_paths
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")
            assert np.array_equal(np.asarray(image), np.asarray(render(scene)))


def test_writing_again_gives_the_same_bytes(tmp_path):
    contents = []
    for name in ("a", "b"):
        write_phantoms(tmp_path / name, "train", 6)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        contents.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    assert len(contents[0]) == 7
    assert contents[0] == contents[1]


def test_splits_live_side_by_side(tmp_path):
    for split in ("train", "val"):
        write_phantoms(tmp_path, split, 2)
    assert [len(read_records(tmp_path, split=split)) for split in ("train", "val")] == [2, 2]
    assert len(list((tmp_path / "images").iterdir())) == 4


def test_larger_phantoms_show_the_same_scenes(tmp_path):
    """Shrunk by half, the larger image is nearly the smaller one without its noise; questions are the same."""
    small, large = (write_phantoms(tmp_path / str(size), "val", 4, size=size) for size in (128, 256))
    assert small.read_bytes() == large.read_bytes()
    for record in read_records(large.parent, split="val"):
        with Image.open(record.image_paths[0]) as image:
            assert image.size == (256, 256)
            shrunk = np.asarray(image.resize((128, 128), Image.Resampling.BOX).convert("L"), dtype=float)
        with Image.open(tmp_path / "128" / "images" / record.image_paths[0].name) as image:
            plain = np.asarray(image.convert("L"), dtype=float)
        assert np.corrcoef(shrunk.ravel(), plain.ravel())[0, 1] > 0.9
