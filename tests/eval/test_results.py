"""Results of a small case list, recomputed by hand."""

import copy
import json

import numpy as np
import pytest
from scipy.stats import binomtest

from vitos.data.files import write_json_atomic
from vitos.eval.results import CONTROL_NAMES, summarize

# Per question: data set, template, then right (1), wrong (0) or no answer (None) under each condition.
TABLE = [
    # set  template  base loc sparse dense random inverted | kept  iou  parsed
    ("a", "count", 1, 1, 1, 1, 1, 0, 0.25, 0.5, True),
    ("a", "count", 0, 1, 1, 0, 0, None, 1.0, None, False),
    ("a", "kind", 1, 0, 0, 1, 0, 1, 0.5, 0.0, True),
    ("b", "kind", 0, 0, 1, 1, 1, 0, 0.125, 1.0, True),
    ("b", "kind", 1, 1, None, 0, 1, 0, 0.75, 0.25, True),
]


def make_cases():
    cases = []
    for name, template, base, loc, sparse, dense, random, inverted, kept, iou, parsed in TABLE:
        conditions = {
            "base_dense": answer(base),
            "localization": answer(loc) | {"iou": iou, "parsed": parsed, "boxes": []},
            "sparse": answer(sparse) | {"kept_ratio": kept, "fallback": not parsed},
            "dense": answer(dense),
            "random": answer(random) | {"kept_ratio": kept, "fallback": False},
        }
        if inverted is not None:  # not defined where everything is kept
            conditions["inverted"] = answer(inverted)
        cases.append({"id": str(len(cases)), "dataset": name, "template": template, "conditions": conditions})
    return cases


def answer(right):
    return {"text": "", "answer": None if right is None else "A", "correct": right == 1}


@pytest.fixture(scope="module")
def results():
    return summarize(make_cases(), bootstrap_samples=200)


def test_accuracies_and_rates(results):
    assert results["num_questions"] == 5
    for name, right in {"base_dense": 3, "localization": 3, "sparse": 3, "dense": 3}.items():
        assert results[f"{name}_accuracy"] == right / 5, name
    assert results["no_answer_rate"] == 1 / 5
    assert results["fallback_rate"] == 1 / 5
    assert results["parse_rate"] == 4 / 5
    assert results["kept_ratio"] == pytest.approx((0.25 + 1 + 0.5 + 0.125 + 0.75) / 5)
    # Five values, sorted: the 10 % point lies 0.4 of the way from the first to the second.
    assert results["kept_ratio_p10"] == pytest.approx(0.125 + 0.4 * 0.125)
    assert results["kept_ratio_p90"] == pytest.approx(1.0 - 0.4 * 0.25)
    assert results["mean_iou"] == pytest.approx((0.5 + 0 + 1 + 0.25) / 4)  # one question has no gold boxes
    assert results["mean_iou_before"] is None


def test_relative_performance_is_the_ratio_of_the_data_sets_averages(results):
    sparse, base = (2 / 3 + 1 / 2) / 2, (2 / 3 + 1 / 2) / 2
    assert results["relative_performance"] == pytest.approx(sparse / base)
    low, high = results["relative_performance_ci"] or (None, None)
    assert low is None or low <= 1 <= high


def test_controls_count_the_questions_they_are_defined_for(results):
    assert results["control_random_accuracy"] == 3 / 5
    assert results["control_inverted_accuracy"] == 1 / 4
    assert results["control_counts"] == dict.fromkeys(CONTROL_NAMES, 0) | {"random": 5, "inverted": 4}
    assert results["control_oracle_accuracy"] is None


def test_comparisons_use_the_questions_of_both_sides(results):
    rows = {row["b"]: row for row in results["comparisons"]}
    assert set(rows) == {"base_dense", "dense", "random", "inverted"}
    row = rows["inverted"]
    # Without question 1: sparse is right on 0 and 3, inverted on 2.
    assert (row["a"], row["num_questions"]) == ("sparse", 4)
    assert row["difference"] == pytest.approx(2 / 4 - 1 / 4)
    assert row["p_value"] == pytest.approx(1.0)  # 2 against 1
    assert row["ci"][0] <= row["difference"] <= row["ci"][1]


def test_groups(results):
    assert list(results["by_template"]) == ["count", "kind"]
    count, kind = results["by_template"].values()
    assert (count["num_questions"], count["sparse"], count["base_dense"]) == (2, 1.0, 0.5)
    assert (kind["num_questions"], kind["sparse"]) == (3, pytest.approx(1 / 3))
    assert (count["mean_iou"], kind["mean_iou"]) == (0.5, pytest.approx(1.25 / 3))
    assert count["kept_ratio"] == 0.625
    assert count["oracle"] is None
    assert [row["num_questions"] for row in results["by_dataset"].values()] == [3, 2]
    assert results["budgets"] == {}


def test_groups_without_a_name_are_no_groups():
    cases = make_cases()
    for case in cases:
        del case["dataset"]
        case["template"] = ""
    found = summarize(cases, bootstrap_samples=50)
    assert (found["by_template"], found["by_dataset"]) == ({}, {})


def test_budgets():
    cases = make_cases()[:2]
    cases[0]["conditions"] |= {
        "own@0.25": answer(1) | {"kept_ratio": 0.25},
        "random@0.25": answer(0) | {"kept_ratio": 0.25},
        "own@0.1": answer(1) | {"kept_ratio": 0.09},
    }
    cases[1]["conditions"] |= {"random@0.25": answer(1) | {"kept_ratio": 0.25}, "oracle@0.5": answer(1)}
    assert summarize(cases, bootstrap_samples=50)["budgets"] == {
        "0.25": {"kept_ratio": 0.25, "sparse": 1.0, "random": 0.5},
        "0.1": {"kept_ratio": 0.09, "sparse": 1.0},
        "0.5": {"kept_ratio": 0.5, "oracle": 1.0},
    }


def changed(before, after, path=""):
    """Names of all figures that differ."""
    if isinstance(before, dict):
        return {name for key in before for name in changed(before[key], after[key], f"{path}/{key}")}
    if isinstance(before, list) and before and isinstance(before[0], dict):
        keyed = [{row["b"]: row for row in rows} for rows in (before, after)]
        return changed(*keyed, path)
    return {path} if before != after else set()


@pytest.mark.parametrize(
    ("condition", "figures"),
    [
        (
            "random",
            {
                "/control_random_accuracy",
                "/comparisons/random",
                "/by_template/count/random",
                "/by_dataset/a/random",
            },
        ),
        (
            "localization",
            {"/localization_accuracy", "/by_template/count/localization", "/by_dataset/a/localization"},
        ),
        (
            "base_dense",
            {
                "/base_dense_accuracy",
                "/relative_performance",
                "/comparisons/base_dense",
                "/by_template/count/base_dense",
                "/by_dataset/a/base_dense",
            },
        ),
    ],
)
def test_one_answer_changes_its_own_figures_and_no_other(condition, figures, results):
    cases = make_cases()
    row = cases[0]["conditions"][condition]
    row["correct"] = not row["correct"]
    found = changed(results, summarize(cases, bootstrap_samples=200))
    found = {"/".join(n.split("/")[:3]) if "/comparisons/" in n or "/conditions/" in n else n for n in found}
    assert found - {"/relative_performance_ci"} == figures | {f"/conditions/{condition}"}


def test_conditions_have_intervals_and_shares_of_tokens():
    cases = make_cases()
    rows = summarize(cases, bootstrap_samples=200)["conditions"]
    for name, row in rows.items():
        correct = [case["conditions"][name]["correct"] for case in cases if name in case["conditions"]]
        exact = binomtest(sum(map(int, correct)), len(correct)).proportion_ci(method="exact")
        assert (row["num_questions"], row["accuracy"]) == (len(correct), pytest.approx(np.mean(correct)))
        assert row["ci"] == pytest.approx([exact.low, exact.high])
    assert rows["base_dense"]["kept_ratio"] == 1
    assert rows["sparse"]["kept_ratio"] == summarize(cases, bootstrap_samples=200)["kept_ratio"]


@pytest.mark.parametrize("right", [0, 1])
def test_hardly_any_question_right_before_training_can_still_be_written(right, tmp_path):
    """With one right answer of five some resample has none: no interval then, and no NaN in the file."""
    cases = make_cases()
    for index, case in enumerate(cases):
        case["conditions"]["base_dense"] = answer(int(index < right))
        case["dataset"] = "a"
    found = summarize(cases, bootstrap_samples=500)
    assert found["relative_performance"] == (pytest.approx(3.0) if right else None)
    assert found["relative_performance_ci"] is None
    write_json_atomic(tmp_path / "results.json", found)
    assert json.loads((tmp_path / "results.json").read_text())["num_questions"] == 5


def test_without_a_base_model_there_is_no_relative_performance():
    cases = make_cases()
    del cases[3]["conditions"]["base_dense"]
    found = summarize(cases, bootstrap_samples=50)
    assert (found["relative_performance"], found["relative_performance_ci"]) == (None, None)
    assert found["base_dense_accuracy"] == 3 / 4


def test_order_of_cases_and_a_second_run_change_nothing(results):
    cases = copy.deepcopy(make_cases())
    assert summarize(cases, bootstrap_samples=200) == results
    backwards = summarize(cases[::-1], bootstrap_samples=200)
    for name, value in results.items():
        if isinstance(value, float):
            assert backwards[name] == pytest.approx(value), name
    np.testing.assert_allclose(
        [row["ci"] for row in backwards["comparisons"]], [row["ci"] for row in results["comparisons"]]
    )


def test_no_case_is_an_error():
    with pytest.raises(ValueError, match=r"no question was evaluated; check data\.eval"):
        summarize([])
