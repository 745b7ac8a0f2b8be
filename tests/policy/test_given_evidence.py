"""A person's boxes and a token budget: arguments of every way to ask."""

import numpy as np
import pytest
import torch
from tests.driven import up_to
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.core.geometry import Box
from vitos.core.masks import fit_budget
from vitos.core.registry import PLANS
from vitos.core.sparsify import select
from vitos.engines.base import Sampling
from vitos.policy.plans import get_plan
from vitos.policy.types import Query

HALF = Box(0.0, 0.0, 0.5, 0.25)
PIXEL = Box(0.5, 0.5, 0.51, 0.51)


@pytest.fixture(scope="module")
def asked(warm_policy, phantom_records):
    record = phantom_records[0]
    return {
        plan: (warm_policy.encode(record.image_paths[0], plan=plan), record.question)
        for plan in PLANS.names()
        if get_plan(plan).localizes
    }


@pytest.mark.parametrize("plan", [name for name in PLANS.names() if get_plan(name).localizes])
def test_boxes_replace_the_localization(warm_policy, asked, plan):
    scan, question = asked[plan]
    found = warm_policy.ask(scan, question, boxes=[HALF], plan=plan, limits=up_to(14))
    expected = np.zeros((8, 8), dtype=bool)
    expected[:2, :4] = True
    np.testing.assert_array_equal(found.kept.mask.reshape(8, 8), expected)
    assert (found.boxes, found.localization, found.fallback) == ((HALF,), None, False)
    assert not any(name.startswith("localize") for name in found.seconds)
    assert warm_policy.ask(scan, question, plan=plan, limits=up_to(40)).localization is not None


def test_the_answer_is_that_of_the_prompt_of_these_tokens(warm_policy, asked):
    scan, question = asked["two_pass"]
    found = warm_policy.ask(scan, question, boxes=[HALF], plan="two_pass", limits=up_to(14))
    backbone, spec = warm_policy.backbone, warm_policy.spec
    (visual,) = scan.visuals
    mask = torch.from_numpy(select(visual.grid, [HALF], spec.keep).mask)
    prompt = backbone.build_prompt(spec.reason_text(question), [visual]).sparse([mask], spec.fusion)
    ((completion,),) = warm_policy.engine.sample([prompt], Sampling(14), [[0]])
    assert found.reasoning.completion.text == completion.text


@pytest.mark.parametrize("plan", ["two_pass", "gather"])
@pytest.mark.parametrize(("budget", "count"), [(0.001, 1), (0.25, 16), (1.0, 64)])
def test_a_budget_is_met_exactly_by_own_and_given_boxes(warm_policy, asked, plan, budget, count):
    scan, question = asked[plan]
    own = warm_policy.ask(scan, question, budget=budget, plan=plan, limits=up_to(40))
    assert own.boxes
    np.testing.assert_array_equal(own.kept.mask, fit_budget(own.grid, own.boxes, count))
    given = warm_policy.ask(scan, question, boxes=[HALF], budget=budget, plan=plan, limits=up_to(14))
    np.testing.assert_array_equal(given.kept.mask, fit_budget(given.grid, [HALF], count))


def test_without_a_box_a_budget_is_a_counted_fallback(warm_policy, asked):
    scan, question = asked["two_pass"]
    found = warm_policy.ask(scan, question, budget=0.25, limits=up_to(2))
    assert found.fallback
    assert found.kept.all


def test_given_and_own_evidence_in_one_batch_are_each_alone(warm_policy, asked):
    scan, question = asked["two_pass"]
    together = warm_policy.ask_many([scan, scan], [question] * 2, boxes=[None, [HALF]], limits=up_to(40))
    for found, boxes in zip(together, (None, [HALF]), strict=True):
        alone = warm_policy.ask(scan, question, boxes=boxes, limits=up_to(40))
        assert found.reasoning.completion.text == alone.reasoning.completion.text
        assert found.boxes == alone.boxes
    steps = warm_policy.stream(scan, question, boxes=[HALF], limits=up_to(40))
    pieces = []
    while True:
        try:
            pieces.append(next(steps))
        except StopIteration as end:
            streamed = end.value
            break
    assert streamed.reasoning.completion.text == alone.reasoning.completion.text
    assert {piece.branch for piece in pieces} == {"reason"}


def test_coarse_uses_the_whole_image_for_a_box_smaller_than_its_cells(warm_policy, asked):
    scan, question = asked["coarse"]
    found = warm_policy.ask(scan, question, boxes=[PIXEL], plan="coarse", limits=up_to(14))
    assert found.fallback_reason.endswith("the image was used at full resolution")
    assert found.localization is None
    assert found.kept.count == 1


@pytest.mark.parametrize(
    ("plan", "given", "said"),
    [
        ("dense", {"boxes": [HALF]}, "answers from all visual tokens"),
        ("dense", {"budget": 0.5}, "answers from all visual tokens"),
        ("coarse", {"budget": 0.5}, "leave out the budget"),
        ("crop", {"budget": 0.5}, "leave out the budget"),
        ("two_pass", {"budget": 0.0}, r"in \(0, 1\], got 0"),
        ("two_pass", {"budget": 1.5}, r"in \(0, 1\], got 1.5"),
        ("two_pass", {"boxes": []}, "leave `boxes` out"),
    ],
)
def test_what_a_plan_cannot_use_is_refused(warm_policy, phantom_records, plan, given, said):
    scan = warm_policy.encode(phantom_records[0].image_paths[0], plan=plan)
    with pytest.raises(ValueError, match=said):
        warm_policy.ask(scan, phantom_records[0].question, plan=plan, **given)


def test_tokens_must_fit_the_image(warm_policy, asked):
    scan, question = asked["two_pass"]
    with pytest.raises(ValueError, match="mask of 64 visual tokens"):
        Query.about(scan, question, tokens=np.ones(63, dtype=bool))


def test_the_command_line_takes_boxes_and_a_budget(phantom_records):
    record = phantom_records[0]
    base = ["ask", "nano", str(record.image_paths[0]), record.question]
    said = CliRunner().invoke(app, [*base, "--box", "0,0,0.5,0.25"])
    assert said.exit_code == 0, said.output
    assert "8 of 64" in said.output
    assert "[0.0, 0.0, 0.5, 0.25]" in said.output
    said = CliRunner().invoke(app, [*base, "--box", "0,0,0.5,0.25", "--box", "0.5,0.5,1,1", "--budget", "0.5"])
    assert "32 of 64" in said.output
    for wrong in (
        ["--box", "0,0,2,2"],
        ["--box", "left"],
        ["--box", "0,0,0.5"],
        ["--budget", "2"],
        ["--plan", "gathr"],
    ):
        said = CliRunner().invoke(app, [*base, *wrong])
        assert said.exit_code == 2, (wrong, said.output)
    assert "did you mean gather?" in said.output
