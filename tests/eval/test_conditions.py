"""Conditions, batches and the store: properties, and changed pictures pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box
from vitos.core.record import Record
from vitos.eval.conditions import Settings, batches, bench_conditions, control_conditions
from vitos.eval.image_ablations import mean_colour, painted, swaps
from vitos.eval.selectors import SELECTORS
from vitos.eval.store import file_name, read_rows, weights_fingerprint
from vitos.policy.plans.crop import cut_out

records_of = st.lists(st.integers(0, 6), min_size=1, max_size=30).map(
    lambda images: [Record(str(i), (Path(f"{image}.png"),), "<image>?", "A") for i, image in enumerate(images)]
)


@given(records_of, st.integers(1, 9))
def test_batches_keep_an_image_s_questions_together(records, size):
    made = batches(records, size)
    assert sorted(r.id for b in made for r in b) == sorted(r.id for r in records)
    holding = {}
    for index, batch in enumerate(made):
        for record in batch:
            assert holding.setdefault(record.image_paths, index) == index
        assert len(batch) <= size or len({r.image_paths for r in batch}) == 1


@given(records_of, st.integers(0, 3))
def test_no_question_is_shown_its_own_image(records, seed):
    found = swaps(records, seed)
    if len({r.image_paths for r in records}) == 1:
        assert found == {}
        return
    assert found.keys() == {r.id for r in records}
    shown = {r.image_paths: found[r.id].image_paths for r in records}
    assert all(a != b for a, b in shown.items())
    assert sorted(shown.values()) == sorted(shown)  # every image replaces exactly one other


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_painting_pixel_by_pixel(width, height, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    corners = st.tuples(*[st.floats(0, 1)] * 4).filter(lambda c: c[0] < c[2] and c[1] < c[3])
    boxes = [Box(*c) for c in data.draw(st.lists(corners, min_size=1, max_size=3))]
    mean = np.array(mean_colour(image))
    assert np.abs(mean - pixels.reshape(-1, 3).mean(0)).max() <= 0.5
    hidden, alone = (np.asarray(painted(image, boxes, inside=inside)) for inside in (True, False))
    for y in range(height):
        for x in range(width):
            shares = [
                min(min(x + 1, b.x2 * width) - max(x, b.x1 * width), min(y + 1, b.y2 * height) - max(y, b.y1 * height))
                for b in boxes
            ]
            # Narrower than 1e-6 of a pixel is what a decimal fraction may be off (`core/geometry.py:touched_pixels`).
            if any(0 < abs(share) < 1e-5 for share in shares) or any(
                min(b.x2 - b.x1, b.y2 - b.y1) < 1e-6 for b in boxes
            ):
                continue
            inside = any(share > 0 for share in shares)
            assert (hidden[y, x] == (mean if inside else pixels[y, x])).all()
            assert (alone[y, x] == (pixels[y, x] if inside else mean)).all()


@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_painted_pixels_are_those_of_a_crop_and_end_where_decimals_do(width, height, data):
    """Edges on pixel borders, written as decimals: 0.29 of 100 pixels is 28.999999999999996 of them, and means 29."""
    x1, x2 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    box = Box(*(round(edge, 9) for edge in (x1 / width, y1 / height, x2 / width, y2 / height)))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[0, 0] = 255
    pixels[y1:y2, x1:x2] = 200
    image = Image.fromarray(pixels)
    expected = pixels.copy()
    expected[y1:y2, x1:x2] = mean_colour(image)
    np.testing.assert_array_equal(np.asarray(painted(image, [box], inside=True)), expected)
    np.testing.assert_array_equal(np.asarray(cut_out(image, box, WHOLE_IMAGE)), pixels[y1:y2, x1:x2])


def test_conditions_come_in_the_order_of_the_ranks():
    """The order of tables and figures. Whoever adds a selector gives it a rank; these stay where they are."""
    names = [
        "policy",
        "one_pass",
        "evidence_head",
        "glance",
        "oracle",
        "inverted",
        "random",
        "centre",
        "uniform",
        "resize",
        "fastv",
        "sparsevlm",
        "pyramiddrop",
        "visionzip",
        "prumerge_plus",
        "holov",
        "vispruner",
        "hiprune",
        "divprune",
        "scope",
        "dart",
        "cdpruner",
        "question",
        "mmtok",
        "tome",
        "crop",
    ]
    assert [name for name in SELECTORS if SELECTORS[name].rank < 1000 and SELECTORS[name].default] == names
    assert bench_conditions(budgets=(0.5, 0.1)) == bench_conditions(names, (0.5, 0.1))
    assert "visionzip_mean@0.5" in bench_conditions(["visionzip_mean"], (0.5,))  # a variant runs where it is named
    own = ("policy@own", "random@own", "inverted@own")
    assert bench_conditions(reversed(names), (0.5,), ablations=False)[2:5] == own
    assert bench_conditions(names, (0.1, 0.5)) == (
        *("localize", "dense", *own),
        *(f"{name}@{budget}" for budget in (0.5, 0.1) for name in names),
        *("blank", "shuffled", "evidence_hidden", "surroundings_hidden"),
    )
    assert bench_conditions(names + names[:2], (0.5,)) == bench_conditions(names, (0.5,))


def test_a_budget_of_one_is_the_dense_condition():
    found = bench_conditions(("random", "divprune"), (1.0,), ablations=False)
    assert found == ("localize", "dense", "random@own")
    without = bench_conditions(("divprune",), (0.5,), ablations=False)
    assert without == ("dense", "divprune@0.5")  # nothing goes by boxes, so none are asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selectors": ("best",)}, "no selector 'best'; known are policy"),
        ({"budgets": (0.5, 1.5)}, r"in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_conditions(changes, message):
    with pytest.raises(ValueError, match=message):
        bench_conditions(**changes)


def test_wrong_settings():
    with pytest.raises(ValueError, match="batch_size"):
        Settings(batch_size=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 2"):
        control_conditions((0.5, 2.0))


@given(st.lists(st.text("aB./-_ é\\\n", min_size=1, max_size=8), min_size=2, max_size=2, unique=True))
def test_file_names_are_one_part_of_a_path_and_unlike(names):
    made = [file_name(name) for name in names]
    assert made[0] != made[1]
    for name in made:
        assert Path("x") / name == Path("x") / Path(name).name
        assert not name.startswith(".")


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "0.jsonl"
    file.write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"0\.jsonl, line 2"):
        read_rows(file)
    file.write_text('{"a": 1}\n{"a": ')
    assert read_rows(file) == [{"a": 1}]


def test_weights_of_one_size_have_names_of_their_own(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3_000_000))
    first = weights_fingerprint(tmp_path)
    file.write_bytes(bytes(2_999_999) + b"x")
    assert weights_fingerprint(tmp_path) != first
    file.write_bytes(bytes(3_000_000))
    assert weights_fingerprint(tmp_path) == first
