"""A crop: the model sees a part of the image, and every box stays in the coordinates of the stored one."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.backbones.families import FAMILIES_BY_NAME
from tests.driven import up_to
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.core.geometry import Box, Rect, TokenGrid, View, into_crop, out_of_crop
from vitos.core.masks import centre_mask, random_mask
from vitos.core.prompt import VisualTokens
from vitos.core.record import Record
from vitos.data.images import ImageError, load_image, load_image_facts
from vitos.data.readers import read_records
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import draw_overlay
from vitos.rl.lessons import record_lesson
from vitos.scans.build import build_cache
from vitos.scans.cache import EmbeddingCache, image_key
from vitos.scans.store import ScanStore

HUNDREDTHS = st.integers(0, 100)


@st.composite
def crops(draw):
    """Corners of a crop in hundredths, at least a tenth of the image each way."""
    x1, y1 = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    return x1, y1, draw(st.integers(x1 + 10, 100)), draw(st.integers(y1 + 10, 100))


def named(path, corners):
    return path.with_name(f"{path.name}#crop={','.join(str(c / 100) for c in corners)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("crops")


@given(crops(), st.integers(20, 90), st.integers(20, 90), st.data())
@settings(max_examples=40)
def test_painted_pixels_come_back_at_their_stored_place(nano, folder, corners, width, height, data):
    """A rectangle painted into the file is found in the crop by its colour, written as the model would, read back."""
    # Exact: every pixel of which some part lies inside the crop.
    left, top = (int(Fraction(c, 100) * side) for c, side in zip(corners, (width, height), strict=False))
    right, bottom = (-int(-Fraction(c, 100) * side // 1) for c, side in zip(corners[2:], (width, height), strict=True))
    x1, y1 = data.draw(st.integers(left, right - 1)), data.draw(st.integers(top, bottom - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, right)), data.draw(st.integers(y1 + 1, bottom))
    stored = np.zeros((height, width), dtype=np.uint8)
    stored[y1:y2, x1:x2] = 255
    path = folder / "painted.png"
    Image.fromarray(stored).save(path)

    picture, facts = load_image_facts(named(path, corners))
    assert picture.size == (right - left, bottom - top)
    assert (facts.width, facts.height) == (width, height)
    rows, cols = np.nonzero(np.asarray(picture)[..., 0])
    found = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    visual = VisualTokens(torch.zeros(12, 1), TokenGrid.single(3, 4), resized=picture.size).within(facts.shown)
    read = nano.box_reader(visual, "absolute")(tuple(map(float, found)))
    assert [v * s for v, s in zip(read.as_tuple(), (width, height) * 2, strict=True)] == pytest.approx(
        [x1, y1, x2, y2]
    )
    written = nano.write_box(Box(x1 / width, y1 / height, x2 / width, y2 / height), visual, "absolute")
    assert [int(number) for number in written] == list(found)


@given(crops(), crops())
def test_out_of_a_crop_and_back(corners, inside):
    crop, box = Box(*(c / 100 for c in corners)), Box(*(c / 100 for c in inside))
    outside = out_of_crop(box, crop)
    assert crop.x1 <= outside.x1 < outside.x2 <= crop.x2
    assert crop.y1 <= outside.y1 < outside.y2 <= crop.y2
    assert into_crop(outside, crop).as_tuple() == pytest.approx(box.as_tuple())


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "llava, HuatuoGPT-Vision", "internvl"])
@torch.no_grad()
def test_boxes_keep_the_tokens_that_look_there(name, picture):
    """A crop keeps the tokens that the same pixels in a separate file keep, padding and tiles too."""
    backbone = FAMILIES_BY_NAME[name].backbone()
    crop = Rect(0.25, 0.5, 0.75, 1.0)
    (alone,) = backbone.encode([picture(200, 90)])
    placed = alone.within(crop)
    box = Box(0.30, 0.55, 0.45, 0.80)
    assert (placed.grid.overlapping([box]) == alone.grid.overlapping([Box(0.1, 0.1, 0.4, 0.6)])).all()
    everything = Box(0, 0, 1, 1)
    assert (placed.grid.overlapping([everything]) == alone.grid.overlapping([everything])).all()
    assert not placed.grid.overlapping([Box(0, 0, 0.2, 0.4)]).any()
    count = alone.grid.num_tokens // 3
    assert (centre_mask(placed.grid, count) == centre_mask(alone.grid, count)).all()
    same = [random_mask(v.grid, count, np.random.default_rng(0)) for v in (placed, alone)]
    assert (same[0] == same[1]).all()


def test_a_crop_is_recorded_and_its_edges_are_pixels(picture, tmp_path):
    picture(50, 40).save(tmp_path / "a.png")
    part, facts = load_image_facts(tmp_path / "a.png#crop=0.11,0,0.5,0.3")
    assert part.tobytes() == picture(50, 40).crop((5, 0, 25, 12)).tobytes()
    assert facts.rendering.crop == (0.1, 0.0, 0.5, 0.3)
    assert facts.to_json()["rendering"] == {"crop": [0.1, 0.0, 0.5, 0.3]}
    assert "crop 0.1,0,0.5,0.3" in facts.summary()


def test_the_range_of_a_gray_image_is_that_of_the_whole(tmp_path):
    values = np.zeros((8, 8), dtype=np.uint16)
    values[:, 4:] = 1000
    values[0, 0] = 4000
    Image.fromarray(values).save(tmp_path / "deep.png")
    part = np.asarray(load_image(tmp_path / "deep.png#crop=0,0.5,1,1"))
    assert set(part.ravel().tolist()) == {0, round(1000 / 4000 * 255)}


def test_too_small_a_crop_is_refused_by_its_name(picture, tmp_path):
    picture(50, 40).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png#crop=0,0,0\.02,1: 1 x 40 carries no evidence"):
        load_image(tmp_path / "a.png#crop=0,0,0.02,1")


def record_file(folder, picture, boxes, crop="#crop=0.5,0,1,1"):
    picture(80, 60).save(folder / "a.png")
    row = {"image_path": f"a.png{crop}", "question": "Which?\nA. cyst\nB. mass", "answer": "A", "bbox": boxes}
    (folder / "test.json").write_text(json.dumps([row]))
    return folder / "test.json"


def test_gold_boxes_are_those_of_the_stored_image(nano, picture, tmp_path):
    (record,) = read_records(record_file(tmp_path, picture, [[0.6, 0.25, 0.75, 0.5]]))
    part, facts = load_image_facts(record.image_paths[0])
    lesson = record_lesson(record, [part], nano, VitosSpec(), facts.shown)
    assert "[[0.20, 0.25, 0.50, 0.50]]" in lesson.exercises[0].target


def test_a_gold_box_outside_the_crop_is_refused(picture, tmp_path):
    with pytest.raises(ValueError, match=r"bbox\[0\].* lies outside the image's crop"):
        read_records(record_file(tmp_path, picture, [[0.1, 0.1, 0.5, 0.4]]))


def test_scans_of_files_are_placed_with_and_without_a_cache(warm_policy, picture, tmp_path):
    """A cache knows a picture by its pixels: the crop of one image may be the whole of another."""
    (record,) = read_records(record_file(tmp_path, picture, None))
    picture(80, 60).crop((40, 0, 80, 60)).save(tmp_path / "half.png")
    half = Record("half", (tmp_path / "half.png",), record.question, "A")
    assert image_key(load_image(record.image_paths[0])) == image_key(load_image(half.image_paths[0]))
    build_cache(warm_policy, [record.image_paths[0]], tmp_path / "cache")
    cache = EmbeddingCache.open(tmp_path / "cache", warm_policy.backbone)
    for scan, other in (
        ScanStore(warm_policy).get([record, half]),
        ScanStore(warm_policy, cache=cache).get([record, half]),
    ):
        assert torch.equal(scan.visuals[0].embeddings, other.visuals[0].embeddings)
        assert scan.visuals[0].grid.shown == Rect(0.5, 0, 1, 1)
        assert scan.visuals[0].grid.views[0].rect == Rect(0.5, 0, 1, 1)
        assert other.visuals[0].grid.views[0].rect == Rect(0, 0, 1, 1)
    direct = warm_policy.encode(record.image_paths[0])
    assert direct.visuals[0].grid.shown == Rect(0.5, 0, 1, 1)


def test_the_overlay_is_of_the_whole_image(picture):
    grid = TokenGrid((View(Rect(0, 0, 1, 1), 2, 2),)).within(Rect(0.5, 0, 1, 1))
    whole = Image.new("RGB", (40, 40), "white")
    drawn = np.asarray(draw_overlay(whole, grid, [0], [], min_side=40))
    assert drawn[30, 10].max() < 200  # left out by the crop
    assert drawn[30, 25].max() < 200  # dropped
    assert drawn[10, 25].min() == 255  # kept


def test_ask_answers_in_stored_coordinates(warm_policy, picture, tmp_path):
    picture(80, 60).save(tmp_path / "a.png")
    warm_policy.save_pretrained(tmp_path / "model")
    question = "What is the finding?\\nA. nodule\\nB. cyst"
    arguments = ["ask", str(tmp_path / "model"), str(tmp_path / "a.png#crop=0.5,0,1,1"), question]
    result = CliRunner().invoke(app, [*arguments, "--overlay", str(tmp_path / "out.png"), "--max-tokens", "60"])
    assert result.exit_code == 0, result.output
    assert "crop 0.5,0,1,1" in result.output
    overlay = Image.open(tmp_path / "out.png")
    assert overlay.width * 60 == overlay.height * 80
    policy = SparseVLM.from_pretrained(tmp_path / "model")
    finding = policy.ask(policy.encode(tmp_path / "a.png#crop=0.5,0,1,1"), question, limits=up_to(60))
    assert all(box.x1 >= 0.5 for box in finding.boxes)
