"""Questions about one, two and three images in one batch: plans, lessons, rollouts, evaluation, report."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.driven import told, up_to

from vitos.core.geometry import Box, matched_iou
from vitos.core.sparsify import KeepRule
from vitos.data.images import load_image
from vitos.engines.base import Sampling
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import cases_in_memory
from vitos.eval.results import summarize
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.reports.html import write_report
from vitos.rl.lessons import record_lesson, supervised_loss
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

ASKED = "What is the finding?\nA. cyst\nB. mass"
TEXTS = [
    "<think>t</think><evidence>[[0.00, 0.00, 0.50, 0.50]]</evidence><answer>A</answer>",
    "<think>t</think><evidence>[[2, 0.50, 0.00, 1.00, 0.50]]</evidence><answer>A</answer>",
    "<think>t</think><evidence>[[9, 0.00, 0.50, 0.25, 1.00], [5, 0.00, 0.00, 0.50, 1.00]]</evidence>"
    "<answer>B</answer>",
]
BOXES = [
    (Box(0, 0, 0.5, 0.5),),
    (Box(0.5, 0, 1, 0.5, 2),),
    (Box(0, 0.5, 0.25, 1, 3), Box(0, 0, 0.5, 1, 2)),
]


@pytest.fixture(scope="module")
def vlm():
    return SparseVLM.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def records(phantom_records):
    """One image, two images that the prompt numbers, and three slices with numbers of their own."""
    paths = [record.image_paths[0] for record in phantom_records]
    questions = [f"<image>{ASKED}", f"<image><image>{ASKED}", ""]
    questions[2] = f"Slice 1: <image>\nSlice 5: <image>\nSlice 9: <image>\n{ASKED}"
    images = [paths[:1], paths[1:3], paths[3:6]]
    return [
        replace(phantom_records[i], image_paths=tuple(images[i]), question=questions[i], answer="A", boxes=BOXES[i])
        for i in range(3)
    ]


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "crop"])
def test_each_question_keeps_what_its_boxes_name(vlm, records, plan):
    scans = [vlm.encode(*record.image_paths, plan=plan) for record in records]
    found = told(vlm, scans, [record.question for record in records], TEXTS, up_to(24), plan)
    for one, boxes, shares in zip(found, BOXES, ([0.25], [0, 0.25], [0, 0.5, 0.125]), strict=True):
        assert one.boxes == boxes
        assert not one.fallback
        assert [image.count / image.grid.num_tokens for image in one.kept.images] == shares
        assert one.kept_ratio == sum(shares) / len(shares)


def test_wrong_numbers_are_a_counted_fallback(vlm, records):
    scans = [vlm.encode(*record.image_paths) for record in records]
    found = told(vlm, scans, [record.question for record in records], TEXTS[::-1], up_to(24), "two_pass")
    assert [one.boxes for one in found] == [(), BOXES[1], ()]
    assert [one.fallback for one in found] == [True, False, True]
    assert [one.kept_ratio for one in found] == [1, 0.125, 1]


def test_other_images_keep_the_middle_if_the_rule_says_so(vlm, records):
    other = vlm.with_spec(keep=KeepRule(other_images=4))
    scan = other.encode(*records[2].image_paths)
    found = other.ask(scan, records[2].question, boxes=[Box(0, 0, 0.5, 0.5, 2)], limits=up_to(2))
    assert [one.count for one in found.kept.images] == [4, 16, 4]
    middle = found.kept.images[0].mask.reshape(8, 8)
    assert middle[3:5, 3:5].all()


def test_a_sparse_prompt_is_the_dense_one_with_tokens_left_out(vlm, records):
    plain = vlm.with_spec(fusion=replace(vlm.spec.fusion, mode="none"))
    scan = plain.encode(*records[2].image_paths)
    query = Query(scan, records[2].question)
    kept, dense = plain.branches.keep(query, BOXES[2]), plain.branches.reason_prompt(query)
    sparse = plain.plan.prompt(plain.branches, query, kept)
    keep = torch.ones(len(dense), dtype=torch.bool)
    keep[dense.is_visual] = torch.from_numpy(np.concatenate([image.mask for image in kept.images]))
    assert torch.equal(sparse.input_ids, dense.input_ids[keep])
    assert torch.equal(sparse.position_ids, dense.position_ids[:, keep])
    assert torch.equal(sparse.embeddings, dense.embeddings[torch.from_numpy(kept.mask)])


def test_lessons_name_the_image(vlm, records):
    lessons = [
        record_lesson(record, [load_image(path) for path in record.image_paths], vlm.backbone, vlm.spec)
        for record in records
    ]
    targets = [lesson.exercises[0].target.partition("<evidence>")[2].partition("</evidence>")[0] for lesson in lessons]
    assert targets[0] == "[[0.00, 0.00, 0.50, 0.50]]"
    assert targets[1] == "[[2, 0.50, 0.00, 1.00, 0.50]]"
    assert targets[2] == "[[9, 0.00, 0.50, 0.25, 1.00], [5, 0.00, 0.00, 0.50, 1.00]]"
    assert "Image 2: <image>" in lessons[1].exercises[0].text
    assert torch.isfinite(supervised_loss(vlm.engine, lessons))


def test_rollouts_of_a_mixed_batch_are_those_of_each_alone(vlm, records):
    options = RolloutOptions(
        num_localizations=2, num_reasonings=1, localize=Sampling(12, 1.0), reason=Sampling(6, 1.0), seed=3
    )
    store = ScanStore(vlm)
    together = roll_out(vlm, records, store.get(records), 0, options, RewardWeights())
    for record, group in zip(records, together.groups, strict=True):
        (alone,) = roll_out(vlm, [record], store.get([record]), 0, options, RewardWeights()).groups
        for a, b in zip(group.localizations, alone.localizations, strict=True):
            assert torch.equal(a.completion.token_ids, b.completion.token_ids)
        iou = [matched_iou(rollout.response.boxes, record.boxes) for rollout in group.localizations]
        assert group.rewards.terms["iou"].tolist() == iou
        assert all(len(kept.images) == len(record.image_paths) for kept in group.kept)


def test_evaluation_controls_and_report(vlm, records, tmp_path):
    boxed = vlm.with_spec(keep=KeepRule(1))
    cases = cases_in_memory(boxed, records, Settings(max_localization_tokens=8, max_reasoning_tokens=6))
    assert [len(case.get("others", ())) for case in cases] == [0, 1, 2]
    assert [case["gold_boxes"] for case in cases] == [[box.to_json() for box in boxes] for boxes in BOXES]
    for case, images in zip(cases, (1, 2, 3), strict=True):
        shown = case["conditions"]
        assert shown["random"]["kept_ratio"] == shown["sparse"]["kept_ratio"]
        assert all(0 <= token < 64 * images for token in shown["oracle"]["kept"])
        assert 0 < shown["oracle"]["kept_ratio"] < 0.6
    oracle = cases[1]["conditions"]["oracle"]["kept"]
    assert min(oracle) >= 64  # the box lies in the second image
    write_report(tmp_path, summarize(cases, bootstrap_samples=50), cases)
    assert (tmp_path / "report.html").stat().st_size > 10_000
