"""`vitos eval` on answers in words: the rule's score, a judge next to it, their agreement, and a blank image."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.engines.judge.stub import StubJudge, answer_of, gold_of, serving

from vitos.config.judge import JudgeSection
from vitos.core.answers import token_f1
from vitos.data.phantom import IN_WORDS, write_phantoms
from vitos.data.readers import read_records
from vitos.eval.conditions import Settings
from vitos.eval.evaluate import Evaluation, evaluate, score
from vitos.eval.judged import agreement
from vitos.eval.open_answers import open_figures

SETTINGS = Settings(batch_size=8, max_localization_tokens=24, max_reasoning_tokens=14)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_is_the_one_of_a_table_of_counts(pairs):
    """Cohen 1960 from the four cells, written with counts; the code uses shares."""
    n = len(pairs)
    both, first, second = (
        sum(f(a, b) for a, b in pairs) for f in (lambda a, b: a and b, lambda a, b: a, lambda a, b: b)
    )
    neither = n - first - second + both
    expected = (first * second + (n - first) * (n - second)) / n**2
    found = agreement(*(np.array(values, dtype=float) for values in zip(*pairs, strict=True)))
    assert found["answers"] == n
    assert found["agreement"] == pytest.approx((both + neither) / n)
    if expected == 1:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx(((both + neither) / n - expected) / (1 - expected))


def test_only_answers_that_both_graded_are_compared():
    found = agreement(np.array([1, 0, 1, np.nan]), np.array([1.0, 0.5, np.nan, 1.0]))
    assert found == {"answers": 2, "agreement": 1, "kappa": 1}  # "partly" is not right
    assert agreement(np.array([np.nan]), np.array([1.0])) == {"answers": 0, "agreement": None, "kappa": None}


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(warm_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    warm_policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("open"), "test", 10, in_words=True)


def opinion(gold, answer):
    """The grade of a judge of its own mind."""
    return zlib.crc32(f"{gold}|{answer}".encode()) % 3 / 2


def grade(handler, prompt, number):
    """It has no grade for the first of the texts."""
    handler.reply(500) if number == 0 else handler.ok(str(opinion(gold_of(prompt), answer_of(prompt))))


@pytest.fixture(scope="module")
def evaluated(checkpoint, data, tmp_path_factory):
    out, stub = tmp_path_factory.mktemp("out"), StubJudge(grade)
    with serving(stub):
        section = JudgeSection(stub.url, "stub", cache=str(out / "cache"), retries=0, parallel=1, seconds=20.0)
        asked = Evaluation(
            name="open", checkpoint=checkpoint, data=(str(data),), settings=SETTINGS, base=checkpoint, judge=section
        )
        results = evaluate(asked, out, console=Console(quiet=True))
    cases = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
    return results, cases, out, stub


def test_phantoms_in_words_ask_the_same_without_options(data, tmp_path):
    lettered = read_records(write_phantoms(tmp_path, "test", 10))
    for one, other in zip(read_records(data), lettered, strict=True):
        assert other.question.startswith(one.question + "\nA.")
        assert one.answer == other.options[other.answer]
        assert (one.boxes, one.meta, one.kind) == (other.boxes, other.meta, IN_WORDS[one.meta["template"]])


def test_every_answer_has_a_score_and_a_grade(evaluated):
    results, cases, _, stub = evaluated
    grades, missing = 0, 0
    for case in cases:
        assert case["kind"] in ("text", "word", "number")
        for row in case["conditions"].values():
            if row["answer"] is None:
                assert (row["judge"], row["score"]) == (0, 0)
            elif row["judge"] is None:
                missing += 1
            else:
                assert row["judge"] == opinion(case["gold"], row["answer"])
                grades += 1
            if case["kind"] == "text" and row["answer"] is not None and not row["correct"]:
                assert row["score"] == pytest.approx(token_f1(row["answer"], case["gold"]))
    assert grades > 20
    assert missing > 0
    assert results["judge"]["model"] == "stub"
    assert "Reference: {gold}" in results["judge"]["prompt"]
    assert results["judge"]["unavailable"] == {"status 500": 1}
    assert {gold_of(prompt) for prompt in stub.prompts} <= {case["gold"] for case in cases}


def test_the_figures_are_the_means_of_the_cases(evaluated):
    results, cases, _, _ = evaluated
    assert results["open"]["num_questions"] == 10
    assert results["open"]["kinds"] == {"text": 6, "number": 2, "word": 2}
    for name, row in results["open"]["conditions"].items():
        found = [case["conditions"][name] for case in cases if name in case["conditions"]]
        graded = [(c["correct"], c["judge"] > 0.5) for c in found if c["judge"] is not None]
        assert row["score"] == pytest.approx(np.mean([c["score"] for c in found]))
        assert row["exact"] == pytest.approx(np.mean([c["correct"] for c in found]))
        assert row["judge"] == pytest.approx(np.mean([c["judge"] for c in found if c["judge"] is not None]))
        assert row["agreement"] == pytest.approx(np.mean([a == b for a, b in graded]))
        assert row["score_ci"][0] <= row["score"] <= row["score_ci"][1]
    assert {"text_only", "untrained_text_only"} <= set(results["open"]["conditions"])
    gaps = {(gap["b"], gap["by"]) for gap in results["open"]["comparisons"]}
    assert {("untrained_sparse", "score"), ("untrained_sparse", "judge"), ("text_only", "score")} <= gaps


def test_the_report_shows_both_and_names_the_judge(evaluated):
    page = (evaluated[2] / "report.html").read_text()
    for text in (
        "Answers in words",
        "Agreement",
        "Kappa",
        "the grade of stub",
        "1 grades could not be had",
        "blank image",
    ):
        assert text in page


def test_scores_can_be_made_again_without_the_judge(evaluated):
    results, _, out, stub = evaluated
    asked = len(stub.prompts)
    (folder,) = (out / "answers").iterdir()
    again = score(folder, out)
    assert again == json.loads(json.dumps(results))
    assert len(stub.prompts) == asked


def test_letters_alone_have_none_of_it(checkpoint, tmp_path):
    asked = Evaluation(
        name="x", checkpoint=checkpoint, data=(str(write_phantoms(tmp_path, "test", 2)),), settings=SETTINGS
    )
    results = evaluate(asked, tmp_path / "out", console=Console(quiet=True))
    assert not {"open", "judge", "control_text_only_accuracy"} & set(results)
    case = json.loads((tmp_path / "out/cases.jsonl").read_text().splitlines()[0])
    assert "kind" not in case
    assert "text_only" not in case["conditions"]
    assert "score" not in case["conditions"]["sparse"]


def test_a_blank_image_can_be_asked_about_letters_too(checkpoint, tmp_path):
    asked = Evaluation(
        name="x",
        checkpoint=checkpoint,
        data=(str(write_phantoms(tmp_path, "test", 2)),),
        settings=SETTINGS,
        text_only=True,
    )
    results = evaluate(asked, tmp_path / "out", console=Console(quiet=True))
    assert results["control_text_only_accuracy"] is not None
    assert any(row["b"] == "text_only" for row in results["comparisons"])


def test_no_question_in_words_has_no_figures():
    assert open_figures([{"conditions": {"sparse": {"correct": True}}}]) == {}
