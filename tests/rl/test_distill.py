"""The evidence head learns what it is shown, stops on held-out images, and leaves the model alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tests.backbones.families import FAMILIES_BY_NAME
from typer.testing import CliRunner

from vitos.backbones.evidence_head import EvidenceHead
from vitos.cli.main import app
from vitos.core.geometry import TokenGrid
from vitos.core.sparsify import best_cells, rectangles, select
from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records
from vitos.policy.plans import get_plan
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.distill import (
    DistillOptions,
    HeadLesson,
    HeadStates,
    distill,
    head_lessons,
    head_loss,
    split_by_image,
)
from vitos.scans.store import ScanStore


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    return write_phantoms(folder, "train", 160)


@pytest.fixture
def nano_policy():
    return SparseVLM.from_pretrained("nano", device="cpu")


@pytest.mark.parametrize("teacher", ["own", "gold", "both"])
def test_lessons_are_the_cells_of_the_teachers_boxes(nano_policy, phantoms, teacher):
    """By hand: the answers of the localization branch, and the records' boxes."""
    records = [dataclasses.replace(r, boxes=()) if i == 3 else r for i, r in enumerate(read_records(phantoms)[:8])]
    lessons = head_lessons(nano_policy, records, {"one_pass": ScanStore(nano_policy)}, DistillOptions(teacher=teacher))
    found = {lesson.record.id: lesson.target.numpy() for lesson in lessons}
    assert len(found) >= 6
    for record in records:
        scan = nano_policy.encode(record.image_paths[0])
        grid, targets = scan.visuals[0].grid, []
        own = nano_policy.ask(scan, record.question, plan="two_pass").localization.response.boxes
        targets += [select(grid, own).mask] if teacher != "gold" and own else []
        targets += [select(grid, record.boxes).mask] if teacher != "own" and record.boxes else []
        assert (record.id in found) == bool(targets)
        if targets:
            np.testing.assert_allclose(found[record.id], np.mean(targets, axis=0))


def test_the_loss_is_the_formula(nano_policy, phantoms):
    records = read_records(phantoms)[:2]
    states = HeadStates(nano_policy, {"one_pass": ScanStore(nano_policy)}, 1, 1 << 30)
    torch.manual_seed(0)
    head = EvidenceHead(nano_policy.backbone.model.config.get_text_config().hidden_size, 8)
    lessons = [HeadLesson(record, (torch.arange(64) % (5 + i) == 0).float()) for i, record in enumerate(records)]
    expected = []
    for lesson, (visual, text) in zip(lessons, states.of(lessons), strict=True):
        p = torch.sigmoid(head(visual, text))
        y = lesson.target
        expected.append(-(3 * y * p.log() + (1 - y) * (1 - p).log()).mean())
    torch.testing.assert_close(head_loss(head, lessons, states, 3.0), sum(expected) / 2, rtol=1e-5, atol=1e-6)


def test_states_are_the_same_with_and_without_memory(nano_policy, phantoms):
    stores = {name: ScanStore(nano_policy, plan=get_plan(name)) for name in ("one_pass", "glance")}
    lessons = [HeadLesson(record, torch.ones(1), plan) for record in read_records(phantoms)[:5] for plan in stores]
    kept, none = (HeadStates(nano_policy, stores, 2, memory) for memory in (1 << 30, 0))
    for _ in range(2):
        for (a, b), (c, d) in zip(kept.of(lessons), none.of(lessons), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_no_image_is_on_both_sides(phantoms):
    records = read_records(phantoms)
    twice = [HeadLesson(r, torch.ones(1)) for r in (*records, *records)]
    training, held_out = split_by_image(twice, 0.25, 1)
    paths = [{one.record.image_paths for one in side} for side in (training, held_out)]
    assert not paths[0] & paths[1]
    assert 0.1 < len(held_out) / len(twice) < 0.4
    assert split_by_image(twice, 0.25, 1) == (training, held_out)
    assert split_by_image(twice, 0.25, 2) != (training, held_out)


def test_distill_from_gold_boxes_finds_held_out_evidence(nano_policy, phantoms):
    """Far more of it than as many random cells; the model's weights are those before; the seed decides the head."""
    before = {name: value.clone() for name, value in nano_policy.backbone.model.state_dict().items()}
    records = read_records(phantoms)
    options = DistillOptions(teacher="gold", layers=3, steps=150, validation=0.2, patience=3)
    report = distill(nano_policy, records, options)
    assert all(torch.equal(before[n], v) for n, v in nano_policy.backbone.model.state_dict().items())
    assert report.trained + report.validated + report.left_out == len(records)
    assert report.recall["all"][0.25] > 0.45
    assert set(report.recall) == {"all", *(r.meta["template"] for r in records)} & set(report.recall)
    best = min(report.losses, key=lambda row: row[2])
    assert report.updates == best[0]
    assert nano_policy.spec.evidence_head.after == 3
    # What it says of itself is what the plan then does: recall of the kept cells, by hand.
    _, held_out = split_by_image(
        head_lessons(nano_policy, records, {"one_pass": ScanStore(nano_policy)}, options),
        options.validation,
        options.seed,
    )
    shares = []
    for lesson in held_out:
        scan = nano_policy.encode(lesson.record.image_paths[0], plan="one_pass")
        (found,) = nano_policy.answer([Query(scan, lesson.record.question, lesson.record.kind)], plan="one_pass")
        shares.append(float(lesson.target.numpy()[found.kept.mask].sum() / lesson.target.sum()))
    assert np.mean(shares) == pytest.approx(report.recall["all"][0.25], abs=1e-6)


def test_one_head_for_two_plans_says_which_and_finds_evidence_under_both(nano_policy, phantoms, tmp_path):
    records = read_records(phantoms)
    plain = ("one_pass", "glance")
    options = DistillOptions(teacher="gold", layers=3, steps=150, validation=0.2, patience=3, plans=plain)
    report = distill(nano_policy, records, options)
    assert report.trained + report.validated + report.left_out == len(records)
    assert min(report.recall[f"{plan}: all"][0.25] for plan in plain) > 0.45
    nano_policy.save_pretrained(tmp_path)
    again = SparseVLM.from_pretrained(tmp_path, device="cpu")
    assert again.backbone.evidence_head.plans == plain
    image, text = records[0].image_paths[0], records[0].question
    for plan in plain:
        finding = again.ask(again.encode(image, plan=plan), text, plan=plan, budget=0.125)
        assert (finding.kept.count, finding.grid.num_tokens, finding.plan) == (8, 64, plan)
    again.backbone.evidence_head.plans = ("glance",)
    with pytest.raises(ValueError, match=r"trained for plan glance, not one_pass.*vitos distill --plan one_pass"):
        again.encode(image, plan="one_pass")


def test_plans_without_a_head_and_families_that_cannot_are_refused(nano_policy, phantoms):
    with pytest.raises(ValueError, match="two_pass does not choose by an evidence head"):
        DistillOptions(plans=("one_pass", "two_pass"))
    with pytest.raises(ValueError, match="at least one plan"):
        DistillOptions(plans=())
    llava = SparseVLM(FAMILIES_BY_NAME["llava, LLaVA-1.5"].backbone())
    with pytest.raises(ValueError, match="one resolution"):
        distill(llava, read_records(phantoms)[:2], DistillOptions(plans=("glance",), teacher="gold"))


def test_the_command_writes_an_ordinary_checkpoint_and_its_report(phantoms, tmp_path):
    out = tmp_path / "with-head"
    command = ["distill", "nano", "--data", str(phantoms), "--out", str(out), "--steps", "20", "--limit", "60"]
    done = CliRunner().invoke(app, [*command, "--validation", "0.3", "--seed", "1"])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "distill.json").read_text())
    assert report["options"]["teacher"] == "own"
    assert report["trained"] + report["validated"] + report["left_out"] == 60
    policy, record = SparseVLM.from_pretrained(out, device="cpu"), read_records(phantoms)[0]
    finding = policy.ask(policy.encode(record.image_paths[0], plan="one_pass"), record.question, plan="one_pass")
    assert finding.kept.count == 16
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, FileExistsError)
    assert "is not empty" in str(again.exception)


def test_too_little_data_is_refused(nano_policy, phantoms):
    records = [dataclasses.replace(r, boxes=()) for r in read_records(phantoms)[:4]]
    with pytest.raises(ValueError, match="0 of 4 questions have boxes"):
        distill(nano_policy, records, DistillOptions(teacher="gold"))
    with pytest.raises(ValueError, match="teacher must be one of own, gold, both"):
        DistillOptions(teacher="none")
    with pytest.raises(ValueError, match="keep in"):
        DistillOptions(keep=0)


def test_rectangles_hold_every_kept_cell():
    rng = np.random.default_rng(0)
    for _ in range(100):
        rows, cols = rng.integers(2, 9, 2)
        grid = TokenGrid.single(int(rows), int(cols))
        kept = best_cells(grid, rng.random(rows * cols).astype(np.float32), int(rng.integers(1, rows * cols + 1)))
        assert (select(grid, rectangles(kept)).mask | ~kept.mask).all()
