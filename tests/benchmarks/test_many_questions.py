"""The timing of many questions: they differ, each image is encoded once, and answers are compared for real."""

import json

import pytest
from benchmarks import many_questions
from benchmarks.__main__ import app
from benchmarks.many_questions import Questions, question, run_questions
from typer.testing import CliRunner

from vitos.core.record import parse_options


def test_questions_differ_and_have_options():
    texts = [question(i) for i in range(24)]
    assert len(set(texts)) == 24
    assert all(list(parse_options(text)) == ["A", "B"] for text in texts)


def test_a_small_measurement(tmp_path):
    args = ["questions", "--out", str(tmp_path), "--size", "64", "--questions", "3", "--runs", "1"]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    results = json.loads((tmp_path / "questions.json").read_text())
    assert results["visual_tokens"] == 16
    assert list(results["cases"]) == ["two_pass", "gather"]
    for case in results["cases"].values():
        assert case["same_texts"] == 3
        assert case["distinct_texts"] > 1
        assert case["ratio"][0] == pytest.approx(case["seconds_of_all"] / case["seconds_of_one"])
    assert "| gather |" in (tmp_path / "questions.md").read_text()


def test_answers_that_differ_from_those_alone_are_seen(monkeypatch):
    real, calls = many_questions._ask, []

    def another_picture_when_alone(vlm, picture, texts, *rest):
        calls.append(len(texts))
        alone = len(calls) > 4  # after the warm-up and one run
        return real(vlm, many_questions.noise(64, 1) if alone else picture, texts, *rest)

    monkeypatch.setattr(many_questions, "_ask", another_picture_when_alone)
    results = run_questions(Questions(plans=("two_pass",), size=64, count=2, runs=1))
    assert calls == [1, 2, 1, 2, 1, 1]
    assert results["cases"]["two_pass"]["same_texts"] < 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"plans": ("fast",)}, "no such plan: 'fast'"), ({"count": 25}, "1 to 24"), ({"kept": 0}, "kept")],
)
def test_refusals(wrong, said):
    with pytest.raises(ValueError, match=said):
        Questions(**wrong)
