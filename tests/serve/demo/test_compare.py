"""What the demo computes, against `ask` and against masks computed by hand."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tests.serve.dicom import write_dicom

from vitos.core.geometry import Box
from vitos.core.masks import fit_budget
from vitos.data.images import DataError
from vitos.data.phantom import SPLIT_OFFSET
from vitos.policy.types import tokens_read, tokens_written
from vitos.policy.vlm import SparseVLM
from vitos.serve.demo import examples as examples_of
from vitos.serve.demo import inputs, render
from vitos.serve.demo.compare import compare, compare_plans, plans_of

HALF = Box(0.0, 0.0, 0.5, 0.25)


# --- answering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "crop"])
def test_dense_and_sparse_are_those_of_ask(vlm, examples, plan):
    for example in examples[-2:]:
        dense, sparse, random = compare(vlm, [example.image], example.question, plan)
        for found, name in ((dense, "dense"), (sparse, plan)):
            alone = vlm.ask(vlm.encode(example.image, plan=name), example.question, plan=name)
            assert found.finding.reasoning.response.text == alone.reasoning.response.text
            assert (found.finding.boxes, found.finding.plan) == (alone.boxes, name)
            np.testing.assert_array_equal(found.finding.kept.mask, alone.kept.mask)
        assert random.finding.kept.count == sparse.finding.kept.count < 64
        assert (random.finding.kept.mask != sparse.finding.kept.mask).any()


def test_each_answer_pays_for_the_image_and_only_localization_writes_boxes(vlm, examples):
    dense, sparse, random = compare(vlm, [examples[0].image], examples[0].question, "two_pass")
    for answer in (dense, sparse, random):
        encode, _, _, reason = answer.seconds
        assert answer.finding.tokens["vision"] == 64
        assert encode > 0
        assert reason > 0
        assert sum(answer.seconds) == pytest.approx(sum(answer.finding.seconds.values()))
    assert dense.seconds[1] == random.seconds[1] == 0 < sparse.seconds[1]
    tokens = dense.finding.tokens
    assert tokens_written(sparse.finding.tokens) > tokens_written(tokens) == tokens["reason_decode"]
    assert tokens_read(tokens) == tokens["prefix"] + tokens["reason_prefill"]


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "crop"])
def test_a_persons_boxes_decide_what_is_kept_and_nothing_is_localized(vlm, examples, plan):
    _, sparse, _ = compare(vlm, [examples[0].image], examples[0].question, plan, boxes=[HALF])
    expected = np.zeros((8, 8), dtype=bool)
    expected[:2, :4] = True
    np.testing.assert_array_equal(sparse.finding.kept.mask.reshape(8, 8), expected)
    assert sparse.finding.boxes == (HALF,)
    assert "localize_decode" not in sparse.finding.tokens
    assert sparse.seconds[1] == 0


def test_other_boxes_give_another_answer(vlm, examples):
    """Each quarter of the image in turn is all that the model sees."""
    texts = set()
    for corner in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        box = Box(*corner, corner[0] + 0.5, corner[1] + 0.5)
        for example in examples:
            _, sparse, _ = compare(vlm, [example.image], example.question, "two_pass", boxes=[box])
            texts.add((example.question, sparse.finding.reasoning.response.text))
    assert len(texts) > len(examples)


def test_a_budget_cuts_or_widens_evidence_and_random_tokens_alike(vlm, examples):
    for share, count in ((0.05, 3), (0.5, 32), (1.0, 64)):
        dense, sparse, random = compare(
            vlm, [examples[0].image], examples[0].question, "gather", budget=share, boxes=[HALF]
        )
        np.testing.assert_array_equal(sparse.finding.kept.mask, fit_budget(dense.finding.grid, [HALF], count))
        assert random.finding.kept.count == count
    for plan in ("coarse", "crop"):
        with pytest.raises(ValueError, match="leave out the budget"):
            compare(vlm, [examples[0].image], examples[0].question, plan, budget=0.5)


def test_the_random_tokens_depend_on_their_seed_only(vlm, examples):
    masks = [
        compare(vlm, [examples[0].image], examples[0].question, "two_pass", seed=s).answers[2].finding.kept.mask
        for s in (0, 0, 1)
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_all_plans_are_compared(vlm, examples):
    comparison = compare_plans(vlm, [examples[4].image], examples[4].question, budget=0.25)
    plans = ["two_pass", "coarse", "crop", "gather"]
    assert [answer.finding.plan for answer in comparison] == ["dense", *plans]
    assert [answer.title for answer in comparison] == ["Dense", *(f"Sparse ({plan})" for plan in plans)]
    kept = {answer.finding.plan: answer.finding.kept.count for answer in comparison}
    assert (kept["dense"], kept["two_pass"], kept["gather"]) == (64, 16, 16)
    assert any("budget does not apply" in note for note in comparison.notes)
    assert any("coarse fell back" in note for note in comparison.notes) == comparison.answers[2].finding.fallback
    possible, refused = plans_of(vlm)
    assert possible == ["two_pass", "coarse", "crop", "gather"]
    assert [text.split(" no ")[0] for text in refused] == [
        "glance: the checkpoint has",
        "one_pass: the checkpoint has",
    ]
    assert plans_of(vlm.with_spec(plan="gather"))[0][0] == "gather"


def test_a_family_says_which_plans_it_refuses():
    from tests.backbones.families import FAMILIES

    family = next(f for f in FAMILIES if "gemma" in f.name)
    plans, refusals = plans_of(SparseVLM(family.backbone()))
    assert plans == ["two_pass", "crop"]
    assert [text.split(":")[0] for text in refusals] == ["coarse", "gather", "glance", "one_pass"]


def test_large_pictures_are_drawn_small(vlm, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 2048, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    dense = compare(vlm, [tmp_path / "a.png"], "What?\nA. x\nB. y", "two_pass", boxes=[HALF]).answers[0]
    assert dense.picture().size[0] <= 2 * inputs.LONGEST_SIDE
    assert inputs.fitting(Image.new("RGB", (2048, 600))).size == (1024, 300)


def test_refusals(vlm, examples):
    for question, plan, budget, words in (
        ("  ", "two_pass", 0, "Write a question"),
        ("<image>", "two_pass", 0, "Write a question"),
        ("x" * 5000, "two_pass", 0, "5000 characters"),
        ("What?", "two_pass", 1.5, r"in \(0, 1\]"),
        ("What?", "dense", 0, "always shown"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(vlm, [examples[0].image], question, plan, budget=budget)


# --- what a person gives, and what is shown -------------------------------------------------------------------------


def test_examples_are_no_scenes_of_training_or_test(tmp_path):
    first, again = (examples_of.draw_examples(tmp_path / name) for name in "ab")
    assert [e.question for e in first] == [e.question for e in again]
    assert [e.image.read_bytes() for e in first] == [e.image.read_bytes() for e in again]
    assert len({e.title for e in first}) == 5
    assert all(e.answer in "ABCD" and "<image>" not in e.question for e in first)
    assert SPLIT_OFFSET["val"] + (examples_of.EXAMPLE_SEED + 1) * 10**6 <= SPLIT_OFFSET["test"]


def record_file(path, image, questions):
    entries = [{"image_path": [image], "question": f"<image>{q}\nA. yes\nB. no", "answer": "A"} for q in questions]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_examples_from_record_files(tmp_path):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "slide.tif")
    write_dicom(tmp_path / "ct.dcm", frames=2)
    slides = record_file(
        tmp_path / "slides.json", "slide.tif", ["A cell at 0.1? Say so.", "A cell at 0.2? Say so.", "Red?"]
    )
    scans = record_file(tmp_path / "scans.json", "ct.dcm#frame=1", ["A cyst?"])
    found = examples_of.record_examples([slides, scans], tmp_path / "out")
    assert [e.title for e in found] == ["A cell at 0.1?", "A cyst?", "Red?"]
    assert [str(e.image).partition("#")[2] for e in found] == ["", "frame=1", ""]
    assert found[0].question == "A cell at 0.1? Say so.\nA. yes\nB. no"
    for example in found:  # the page serves nothing but this folder
        assert example.image.parent == example.icon.parent == tmp_path / "out"
        assert re.fullmatch(r"example-\d\.(tif|dcm#frame=1)", example.image.name)  # no name of a patient
        assert max(Image.open(example.icon).size) == 64
    assert inputs.open_image(found[1].image)[0].size == (64, 64)
    assert len(examples_of.record_examples([slides, scans], tmp_path / "two", count=2)) == 2


def test_record_files_without_examples(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = record_file(tmp_path / "broken.json", "bad.png", ["Red?"])
    with pytest.raises(DataError, match=r"broken.*bad\.png"):
        examples_of.record_examples([broken], tmp_path / "out")
    cut = record_file(tmp_path / "cut.json", "bad.png#crop=0,0,0.5,0.5", ["Red?"])
    with pytest.raises(DataError, match="no question about 1 to 32 whole images"):
        examples_of.record_examples([cut], tmp_path / "out")


def test_examples_about_several_images_share_their_files(tmp_path):
    write_dicom(tmp_path / "ct.dcm", frames=3)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    question = "Slice 4: <image>\nSlice 8: <image>\nImage 9: <image>\nWhich slice shows it?\nA. 4\nB. 8"
    entry = {"image_path": ["ct.dcm#frame=1", "ct.dcm#frame=3", "a.png"], "question": question, "answer": "A"}
    (tmp_path / "r.json").write_text(json.dumps([entry]), encoding="utf-8")
    (found,) = examples_of.record_examples([tmp_path / "r.json"], tmp_path / "out")
    assert [path.name for path in found.images] == [
        "example-1-1.dcm#frame=1",
        "example-1-1.dcm#frame=3",
        "example-1-2.png",
    ]
    assert (found.title, found.question) == ("Which slice shows it?", question)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_boxes_are_read_as_they_are_written():
    boxes = (Box(0.1, 0.2, 0.3, 0.4), Box(0, 0, 1, 1), Box(0.5, 0.5, 0.5001, 0.75))
    text = inputs.format_boxes(boxes)
    assert text == "0.1, 0.2, 0.3, 0.4\n0, 0, 1, 1\n0.5, 0.5, 0.5001, 0.75"
    assert inputs.parse_boxes(text) == boxes
    assert inputs.parse_boxes("[0.1, 0.2, 0.3, 0.4],\n\n [0 0 1 1]") == boxes[:2]
    assert inputs.parse_boxes("") == inputs.parse_boxes(None) == ()
    for text, words in (
        ("0,0,1", "Box 1 is not four"), ("0,0,1,1\na", "Box 2 is not four"), ("0,0,1,2", "Box 1 does not lie"),
        ("0.5,0,0.4,1", "x1 < x2"), ("nan,0,1,1", "does not lie"), ("0,0,1,1\n" * 33, "at most 32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            inputs.parse_boxes(text)
    assert inputs.readable_boxes("0,0,1,1\n0.1, 0.") == (Box(0, 0, 1, 1),)
    several = (Box(0.1, 0.2, 0.3, 0.4, 17), Box(0, 0, 1, 1, 2))
    assert inputs.format_boxes(several, several=True) == "17: 0.1, 0.2, 0.3, 0.4\n2: 0, 0, 1, 1"
    assert inputs.parse_boxes("17: [0.1, 0.2, 0.3, 0.4]\n0 0 1 1", image=2) == several
    for text in ("x: 0,0,1,1", "0: 0,0,1,1", "1.5: 0,0,1,1", "-1: 0,0,1,1"):
        with pytest.raises(ValueError, match="Box 1"):
            inputs.parse_boxes(text)


def test_two_corners_in_any_order_are_a_box():
    assert inputs.box_between((0.75, 0.125), (0.25, 0.5)) == Box(0.25, 0.125, 0.75, 0.5)
    assert inputs.box_between((-1, -1), (2, 0.5)) == Box(0, 0, 1, 0.5)
    with pytest.raises(ValueError, match="must differ"):
        inputs.box_between((0.5, 0.1), (0.5, 0.9))


def test_names_of_pictures():
    assert str(inputs.windowed("a.dcm#frame=2", (40, 400))) == "a.dcm#frame=2&window=40,400"
    assert str(inputs.windowed("a.dcm", (40.5, 400))) == "a.dcm#window=40.5,400"
    assert str(inputs.windowed("a.dcm#window=1,2", (40, 400))) == "a.dcm#window=1,2"
    assert str(inputs.windowed("a.dcm#frame=2", None)) == "a.dcm#frame=2"


def test_sixteen_bits_have_a_window_eight_have_none(tmp_path):
    values = np.linspace(100, 4100, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.new("L", (64, 64)).save(tmp_path / "flat.png")
    _, facts = inputs.open_image(tmp_path / "deep.png")
    own = inputs.window_range(facts)
    assert own == inputs.WindowRange(window=(2100, 4000), low=100, high=4100, widest=4000)
    assert inputs.window_range(inputs.open_image(tmp_path / "flat.png")[1]) is None
    assert own.chosen(2100.4, 3999.5) is None
    assert own.chosen(2102, 4000) == (2102, 4000)
    assert own.chosen(9000, 0) == (4100, 1)


def test_what_a_model_wrote_is_text_not_markup(vlm, examples):
    question = "Which?\nA. <script>alert(1)</script>\nB. <b>cyst</b>"
    comparison = compare(vlm, [examples[4].image], question, "two_pass")
    table = render.results_table(comparison, question)
    headings = [render.heading(answer, question) for answer in comparison]
    for html in (table, render.thoughts(comparison, question), *headings):
        assert "<script" not in html
        assert "<b>cyst" not in html
    assert table.count("<tr>") == 4
