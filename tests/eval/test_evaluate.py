"""Every condition of an evaluation, against the answers asked for one by one."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.driven import up_to

import vitos.eval.evaluate as evaluate_module
from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.geometry import Rect, TokenGrid, View
from vitos.core.sparsify import Fusion, Kept
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.eval.cases import BASE, RL_DENSE, TRAINED, cases_of
from vitos.eval.conditions import DENSE, LOCALIZE, OWN_BOXES, EvalSet, Settings, control_conditions
from vitos.eval.evaluate import Evaluation, evaluate
from vitos.eval.results import summarize
from vitos.eval.run import AskedModel, run_models
from vitos.eval.store import EvalFolder
from vitos.policy.plans import Limits
from vitos.policy.spec import HeadRule
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

SETTINGS = Settings(batch_size=7, max_localization_tokens=24, max_reasoning_tokens=14)
CONTROLS = {"random", "centre", "inverted", "shifted", "oracle"}


@pytest.fixture(scope="module")
def models(warm_policy):
    """The policy, and the policy with other specs as the model before training and as RL without pruning."""
    return warm_policy, warm_policy.with_spec(fusion=Fusion("none")), warm_policy.with_spec(reason_prompt="{question}")


@pytest.fixture(scope="module")
def records(phantom_records):
    """Seven boxed questions and one without boxes."""
    return [*phantom_records[:7], replace(phantom_records[7], boxes=None)]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """`answered(policy, records, base=, rl_dense=, budgets=, controls=, **settings)`: the cases of a run."""

    def run(policy, records, base=None, rl_dense=None, budgets=(0.25,), controls=True, **changes):
        out = tmp_path_factory.mktemp("answers")
        asked = {TRAINED: (policy, control_conditions(budgets, controls=controls and policy.plan.takes_masks))}
        asked |= {BASE: (base, (LOCALIZE, OWN_BOXES, DENSE))} if base else {}
        asked |= {RL_DENSE: (rl_dense, (DENSE,))} if rl_dense else {}
        models = [
            AskedModel(name=name, path="", conditions=conditions, load=lambda model=model: model)
            for name, (model, conditions) in asked.items()
        ]
        run_models(models, [EvalSet("phantoms", tuple(records))], replace(SETTINGS, **changes), out)
        folder = EvalFolder(out)
        by_id = {record.id: record for record in records}
        return [
            SimpleNamespace(
                record=by_id[case["id"]],
                conditions=case["conditions"],
                grid=TokenGrid(
                    tuple(View(Rect(*v["rect"]), v["rows"], v["cols"]) for v in case["grid"]), Rect(*case["shown"])
                ),
                case=case,
                folder=folder,
            )
            for case in cases_of(folder, list(asked))
        ]

    return run


def run(answered, models, records, **changes):
    policy, base, dense = models
    return answered(policy, records, base=base, rl_dense=dense, **changes)


@pytest.fixture(scope="module")
def cases(answered, models, records):
    found = run(answered, models, records)
    assert not all(case.conditions["sparse"]["fallback"] for case in found)
    return found


def test_own_conditions_are_what_ask_answers(models, records, cases):
    policy, base, _ = models
    for model, names in ((policy, ("localization", "sparse")), (base, ("untrained_localization", "untrained_sparse"))):
        for record, case in zip(records, cases, strict=True):
            scan = model.encode(record.image_paths[0])
            query = Query(scan, record.question)
            ((located,),) = model.localize([query], Sampling(24))
            (ready,) = model.plan.reason(model.branches, query, [located.response.boxes], Stopwatch())
            selection = ready.kept
            ((answered,),) = model.reason([query], [ready.prompt], Sampling(14))
            first, second = (case.conditions[name] for name in names)
            assert case.record is record
            assert first["text"] == located.completion.text
            assert first["boxes"] == [list(box.as_tuple()) for box in located.response.boxes]
            assert first["parsed"] == bool(located.response.boxes)
            assert (first["iou"] is None) == (record.boxes is None)
            assert second["text"] == answered.completion.text
            assert second["correct"] == (answered.response.answer == record.answer)
            assert second["kept"] == np.flatnonzero(selection.mask).tolist()
            assert second["kept_ratio"] == len(second["kept"]) / 64
            assert second["fallback"] == (not first["parsed"])


@pytest.mark.parametrize(("name", "model"), [("dense", 0), ("base_dense", 1), ("rl_dense", 2)])
def test_dense_conditions_see_all_tokens(name, model, models, records, cases):
    policy = models[model]
    for record, case in zip(records, cases, strict=True):
        query = Query(policy.encode(record.image_paths[0]), record.question)
        ((answered,),) = policy.reason([query], [policy.branches.reason_prompt(query)], Sampling(14))
        assert case.conditions[name]["text"] == answered.completion.text


def test_controls_have_the_policy_s_number_of_tokens(cases):
    for case in cases:
        own = set(case.conditions["sparse"]["kept"])
        for name in ("random", "centre", "shifted", "inverted"):
            row = case.conditions.get(name)
            undefined = len(own) == 64 if name == "inverted" else not case.conditions["localization"]["parsed"]
            assert (row is None) == (undefined and name in ("shifted", "inverted")), (case.record.id, name)
            if row is not None:
                count = min(len(own), 64 - len(own)) if name == "inverted" else len(own)
                assert len(row["kept"]) == count, (case.record.id, name)
        if "inverted" in case.conditions:
            assert not own & set(case.conditions["inverted"]["kept"])
        assert ("oracle" in case.conditions) == (case.record.boxes is not None)
        if case.record.boxes:
            grid = case.grid.overlapping(case.record.boxes)
            assert case.conditions["oracle"]["kept"] == np.flatnonzero(grid).tolist()


def test_a_control_is_answered_from_its_own_tokens(models, cases):
    policy, answered = models[0], 0
    for case in cases:
        query = Query(policy.encode(case.record.image_paths[0]), case.record.question)
        for name in (CONTROLS | {"random@0.25", "own@0.25"}) & case.conditions.keys():
            mask = np.isin(np.arange(64), case.conditions[name]["kept"])
            prompt = policy.plan.prompt(policy.branches, query, Kept(query.grid, mask))
            ((rollout,),) = policy.reason([query], [prompt], Sampling(14))
            assert case.conditions[name]["text"] == rollout.completion.text, name
            answered += 1
    assert answered > 30


def test_budgets_have_their_number_of_tokens(cases):
    for case in cases:
        at_budget = {name: row for name, row in case.conditions.items() if name.endswith("@0.25")}
        expected = {"random", "centre"} | ({"oracle"} if case.record.boxes else set())
        if case.conditions["localization"]["parsed"]:
            expected |= {"own", "inverted"}
        assert {name.split("@")[0] for name in at_budget} == expected
        assert all(len(row["kept"]) == 16 for row in at_budget.values())


def test_without_evidence_controls_of_its_place_are_left_out(answered, models, records):
    """Three tokens are too few for a box: everything is kept, and there is nothing to shift or to invert."""
    (case,) = answered(models[0], records[:1], max_localization_tokens=3)
    assert set(case.conditions) == {
        *("localization", "sparse", "dense", "random", "centre", "oracle"),
        *("random@0.25", "centre@0.25", "oracle@0.25"),
    }
    assert case.conditions["sparse"]["fallback"]
    for name in ("sparse", "random", "centre"):
        assert case.conditions[name]["kept"] == list(range(64))


def test_conditions_that_are_not_asked_for_are_absent(answered, models, records):
    (case,) = answered(models[0], records[:1], controls=False, budgets=())
    assert set(case.conditions) == {"localization", "sparse", "dense"}


def test_batch_size_does_not_change_answers(answered, models, records, cases):
    # The last three: question 7 was alone in its batch of at most seven, the others were not.
    for a, b in zip(run(answered, models, records[5:], batch_size=1), cases[5:], strict=True):
        assert a.case == b.case


def test_the_seed_draws_other_random_tokens_only(answered, models, records, cases):
    others = run(answered, models, records[:3], seed=1)
    assert any(
        a.conditions["random"]["kept"] != b.conditions["random"]["kept"] for a, b in zip(others, cases, strict=False)
    )
    for a, b in zip(others, cases, strict=False):
        for name in ("localization", "sparse", "dense", "centre", "oracle", "base_dense"):
            assert a.conditions.get(name) == b.conditions.get(name)


def spans(folder, model, *conditions):
    rows = folder.times(model, "phantoms")
    return {span for row in rows if row["condition"] in conditions for span in row["seconds"]}


def test_times_are_kept_by_condition(answered, models, records):
    policy, base, _ = models
    (case, *_) = answered(policy, records[:3], base=base, batch_size=2, controls=False, budgets=())
    branch = ("prefill", "decode")
    sparse = {"sparsify", *(f"{b}_{m}" for b in ("localize", "reason") for m in branch)}
    assert spans(case.folder, TRAINED, LOCALIZE, OWN_BOXES) == sparse
    assert spans(case.folder, BASE, DENSE) == {"sparsify", *(f"reason_{m}" for m in branch)}
    assert spans(case.folder, TRAINED, "images") == {"open", "vision"}
    counted = [row["questions"] for row in case.folder.times(TRAINED, "phantoms") if row["condition"] == DENSE]
    assert counted == [2, 1]


def test_cases_are_json_and_make_results(cases, records):
    rows = json.loads(json.dumps([case.case for case in cases]))
    assert rows[0]["grid"] == [{"rect": [0, 0, 1, 1], "rows": 8, "cols": 8}]
    assert rows[0]["gold_boxes"] == [list(box.as_tuple()) for box in records[0].boxes]
    assert rows[7]["gold_boxes"] == []
    assert rows[0]["template"] == records[0].meta["template"]
    results = summarize(rows, bootstrap_samples=50)
    right = [case.conditions["sparse"]["answer"] == case.record.answer for case in cases]
    assert results["sparse_accuracy"] == sum(right) / 8
    assert results["control_counts"]["oracle"] == 7
    assert set(results["budgets"]) == {"0.25"}


@pytest.mark.parametrize("plan", ["gather", "coarse", "crop"])
def test_every_plan_is_what_ask_answers(answered, plan, warm_policy, records):
    policy = warm_policy.with_spec(plan=plan)
    path = records[2].image_paths[0]
    cropped = replace(records[2], image_paths=(path.with_name(f"{path.name}#crop=0,0.25,1,1"),), boxes=None)
    asked = [*records[:2], cropped]
    found = answered(policy, asked, base=policy, budgets=(0.25,) if plan == "gather" else ())
    assert found[2].grid.shown.y1 == 0.25
    for record, case in zip(asked, found, strict=True):
        scan = policy.encode(record.image_paths[0])
        finding = policy.ask(scan, record.question, limits=Limits(max_tokens=14, max_evidence_tokens=24))
        dense = policy.ask(
            policy.encode(record.image_paths[0], plan="dense"), record.question, plan="dense", limits=up_to(14)
        )
        conditions = case.conditions
        assert conditions["sparse"]["text"] == finding.reasoning.completion.text
        assert conditions["sparse"]["kept"] == np.flatnonzero(finding.kept.mask).tolist()
        assert conditions["sparse"]["fallback"] == finding.fallback
        assert conditions["localization"]["text"] == finding.localization.completion.text
        assert conditions["dense"]["text"] == dense.reasoning.completion.text == conditions["base_dense"]["text"]
        assert conditions["untrained_sparse"] == conditions["sparse"]
        assert ("random" in conditions) == ("own@0.25" in conditions) == (plan == "gather")
        assert case.grid == finding.grid
    assert ("prefix" in spans(found[0].folder, TRAINED, "images")) == (plan == "gather")


def test_a_plan_that_writes_no_boxes_is_what_ask_answers(answered, warm_policy, records):
    """Its rectangles are kept, but it has no text of a localization, and no answer in it."""
    backbone = copy.copy(warm_policy.backbone)
    torch.manual_seed(0)
    backbone.evidence_head = EvidenceHead(backbone.model.config.get_text_config().hidden_size, 8)
    policy = SparseVLM(backbone, replace(warm_policy.spec, plan="one_pass", evidence_head=HeadRule(after=2)))
    asked = [*records[:2], replace(records[0], id="again")]
    found = answered(policy, asked, base=policy, budgets=())
    for record, case in zip(asked, found, strict=True):
        finding = policy.ask(policy.encode(record.image_paths[0]), record.question, limits=up_to(14))
        conditions = case.conditions
        assert conditions["sparse"]["text"] == finding.reasoning.completion.text
        assert conditions["sparse"]["kept"] == np.flatnonzero(finding.kept.mask).tolist()
        assert len(conditions["random"]["kept"]) == 16
        assert "localization" not in conditions
    spent = spans(found[0].folder, TRAINED, OWN_BOXES)
    assert {"early_prefill", "reason_prefill", "reason_decode"} <= set(spent)
    results = summarize([case.case for case in found], bootstrap_samples=100)
    assert results["localization_accuracy"] is None
    assert results["sparse_accuracy"] is not None


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("dense", "answers by plan dense as well"),
        ("one_pass", "one_pass writes none"),
        ("crop", "budgets choose among the tokens of one image"),
    ],
)
def test_plans_that_an_evaluation_cannot_run_are_refused(phantom_records, tmp_path, plan, said):
    wrong = Evaluation(name="x", checkpoint="nano", data=(), budgets=(0.25,), plan=plan)
    with pytest.raises(ValueError, match=said):
        evaluate(wrong, tmp_path)


def test_a_broken_image_is_left_out_named_and_tried_again(answered, warm_policy, records, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    asked = [*records[:2], replace(records[2], id="broken", image_paths=(path,))]
    found = answered(warm_policy, asked, controls=False, budgets=())
    assert [case.case["id"] for case in found] == [record.id for record in records[:2]]
    ((row,), folder) = found[0].folder.left_out(TRAINED), found[0].folder
    assert (row["dataset"], row["id"]) == ("phantoms", "broken")
    assert "broken.png" in row["reason"]
    path.write_bytes(records[2].image_paths[0].read_bytes())
    conditions = control_conditions(controls=False)
    model = AskedModel(name=TRAINED, path="", conditions=conditions, load=lambda: warm_policy)
    run_models([model], [EvalSet("phantoms", tuple(asked))], SETTINGS, folder.path)
    assert folder.left_out(TRAINED) == []
    assert [case["id"] for case in cases_of(folder, [TRAINED])] == [record.id for record in asked]


def test_a_folder_that_cannot_be_written_is_said_before_a_question_is_asked(warm_policy, records, tmp_path):
    (tmp_path / "file").write_text("")

    def load():
        raise AssertionError("no model is loaded")

    model = AskedModel(name=TRAINED, path="", conditions=control_conditions(), load=load)
    with pytest.raises(OSError, match="file"):
        run_models([model], [EvalSet("phantoms", tuple(records))], SETTINGS, tmp_path / "file" / "answers")


@pytest.mark.parametrize(("unread", "said"), [(1.0, "100%"), (0.5, "50%"), (0.49, ""), (None, "")])
def test_a_model_that_does_not_know_the_form_of_answers_is_sent_to_the_warm_start(unread, said):
    hint = evaluate_module._hint({"no_answer_rate": unread})
    assert hint.startswith(said)
    assert ("warm_start" in hint) == bool(said)
