"""Rewards by a judge: who is asked, what is learned, and what a missing grade does to its group."""

import json

import numpy as np
import pytest
from tests.engines.judge.stub import StubJudge, answer_of, gold_of, serving

from vitos.config.judge import JudgeSection
from vitos.config.options import DualStreamOptions
from vitos.core.answers import token_f1
from vitos.core.record import Record
from vitos.core.response import parse_localization, parse_reasoning
from vitos.engines.judge.judge import Judge
from vitos.policy.spec import VitosSpec
from vitos.rl.batch import signal
from vitos.rl.extra import AnsweredQuestion
from vitos.rl.metrics import _judge_metrics
from vitos.rl.rewards import RewardWeights, reward_questions
from vitos.rl.schedule import LOCALIZATION, REASONING

WEIGHTS = RewardWeights(format=0.2, iou=1.0, accuracy=1.0, feedback=0.5)
GRADES = {"sinister lung": 1.0, "lung": 0.5, "right lung": 0.0}


def record(kind="text", **fields):
    return Record("vqa-7", (), "<image>Where?", "left lung", kind=kind, **fields)


def answered(first, second, kind="text"):
    """Localizations and reasonings with these answers; None for a text without one."""
    dense = [
        f"<think></think><evidence>[[0, 0, 1, 1]]</evidence><answer>{a}</answer>" if a else "?<think>" for a in first
    ]
    sparse = [[f"<think></think><answer>{a}</answer>" if a else "<think>" for a in row] for row in second]
    return AnsweredQuestion(
        record(kind),
        [parse_localization(text, written=True) for text in dense],
        [[parse_reasoning(text, None, True) for text in row] for row in sparse],
    )


def grade(handler, prompt, number):
    handler.ok(str(GRADES[answer_of(prompt)]))


@pytest.fixture
def run(tmp_path):
    def reward(stub, questions, **settings):
        with serving(stub):
            section = JudgeSection(stub.url, "stub", cache=str(tmp_path / "cache"), retries=0, seconds=5.0, **settings)
            return reward_questions(questions, WEIGHTS, judge=Judge(section))

    return reward


def test_grades_take_the_place_of_the_rule(run):
    stub = StubJudge(grade)
    question = answered(["Left lung.", "right lung"], [["lung", None], ["sinister lung", "right lung"]])
    (found,) = run(stub, [question])
    np.testing.assert_array_equal(found.terms["accuracy"], [1, 0])
    np.testing.assert_array_equal(found.terms["sparse_accuracy"], [[0.5, 0], [1, 0]])
    # 0.2·format + acc + 0.5·partner; the second reasoning has no format
    np.testing.assert_allclose(found.localization, [[1.45, 1.2], [0.7, 0.2]])
    np.testing.assert_allclose(found.reasoning, [[1.2, 0.5], [1.2, 0.2]])
    # exactly right and missing answers are not asked, equal ones once
    assert sorted(map(answer_of, stub.prompts)) == ["lung", "right lung", "sinister lung"]
    assert {gold_of(prompt) for prompt in stub.prompts} == {"left lung"}
    assert (found.graded, found.ungraded) == (4, 0)


def test_other_kinds_are_scored_by_the_rule(run):
    stub = StubJudge(grade)
    (found,) = run(stub, [answered(["lung"], [["right lung"]], kind="word")])
    assert (found.graded, stub.prompts) == (None, [])
    (found,) = run(stub, [answered(["lung"], [["right lung"]], kind="word")], kinds=("word",))
    assert (found.graded, found.terms["accuracy"].tolist()) == (2, [0.5])
    plain = reward_questions([answered(["lung"], [["right lung"]])], WEIGHTS)[0]
    assert plain.terms["accuracy"].tolist() == [pytest.approx(token_f1("lung", "left lung"))]


def test_one_missing_grade_makes_the_whole_group_abstain_and_no_other(run):
    def behave(handler, prompt, number):
        handler.drop() if answer_of(prompt) == "lung" else grade(handler, prompt, number)

    broken = answered(["left lung", "right lung"], [["lung", "right lung"], ["sinister lung", "right lung"]])
    whole = answered(["left lung", "right lung"], [["left lung", "right lung"]] * 2)
    first, second = run(StubJudge(behave), [broken, whole])
    assert np.isnan(first.terms["accuracy"]).all()
    assert np.isnan(first.terms["sparse_accuracy"]).all()
    assert (first.graded, first.ungraded) == (5, 1)
    np.testing.assert_allclose(first.localization, 0.2)  # the format alone: a 0 would have made them differ
    np.testing.assert_allclose(first.reasoning, 0.2)
    np.testing.assert_array_equal(second.terms["accuracy"], [1, 0])

    groups = [Group(first), Group(second)]
    for branch in (LOCALIZATION, REASONING):
        learned = signal(groups, branch, DualStreamOptions())
        assert learned.any(axis=(1, 2)).tolist() == [False, True]
    figures = _judge_metrics(groups)
    assert figures == {
        "judge/answers": 8,
        "judge/unavailable_rate": 1 / 8,
        "judge/abstained_groups": 1,
        "judge/one_grade_rate": 0,
    }


def test_groups_with_one_grade_are_counted(run):
    same = answered(["lung", "lung"], [["lung", "lung"]] * 2)
    found = run(StubJudge(lambda handler, prompt, number: handler.ok("partly")), [same, answered(["lung"], [["x"]])])
    assert _judge_metrics([Group(one) for one in found])["judge/one_grade_rate"] == 1
    assert not signal([Group(found[0])], REASONING, DualStreamOptions()).any()


def test_partial_scores_are_a_signal():
    """Token F1 of 2/3 against 0: nobody is exactly right, but one answer is better."""
    found = reward_questions([answered(["lung", "spleen"], [["lung", "spleen"]] * 2)], WEIGHTS)
    for branch in (LOCALIZATION, REASONING):
        assert signal([Group(found[0])], branch, DualStreamOptions()).all()


class Group:
    def __init__(self, rewards):
        self.rewards = rewards


# --- a training -----------------------------------------------------------------------------------------------------


def test_a_run_on_open_answers_with_a_judge_can_be_repeated_without_it(
    make_trainer, warm_policy, clone_policy, phantom_records, tmp_path
):
    """Grades come from the cache the second time, from a server that is gone; the weights are the same."""
    records = [
        Record(r.id, r.image_paths, r.question.split("\n")[0], r.options[r.answer], r.boxes, r.meta, "text")
        for r in phantom_records
    ]

    def train(name, url):
        policy = clone_policy(warm_policy)
        section = JudgeSection(url, "stub", cache=str(tmp_path / "cache"), retries=0, seconds=20.0)
        trainer = make_trainer(policy, tmp_path / name, records=records, judge=Judge(section))
        trainer.train()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return policy.backbone.model.state_dict(), [json.loads(line) for line in lines]

    stub = StubJudge(lambda handler, prompt, number: handler.ok(str(len(answer_of(prompt)) % 2)))
    with serving(stub):
        first, rows = train("first", stub.url)
    again, other = train("again", "http://127.0.0.1:9/v1")
    assert stub.prompts
    assert rows[0]["judge/answers"] > 0
    for row in (*rows[:2], *other[:2]):
        assert row["judge/unavailable_rate"] == 0
    assert all(bool((first[name] == again[name]).all()) for name in first)


def test_prompts_of_open_questions_ask_for_their_kind():
    spec = VitosSpec()
    texts = [spec.reason_text("Where?", kind) for kind in ("word", "number", "list", "text")]
    assert [
        word in text for word, text in zip(("one word", "unit", "semicolons", "few words"), texts, strict=True)
    ] == [True] * 4
    assert not any("letter" in text for text in texts)
