"""What an evaluation showed, in sentences: a claim only where its interval allows it."""

import pytest

from vitos.reports.summary import summary


def text(results):
    return " ".join(summary(results))


def test_says_what_was_measured_and_how_it_came_out(results):
    words = text(results)
    assert "On 600 questions of phantom/test, the base model answered 61.2% correctly with all visual tokens." in words
    assert "answered 68.3% correctly and saw 24.1% of the visual tokens" in words
    assert "111.6% with a 95% interval of 105.0% to 118.0%: the sparse branch is better" in words
    assert "the sparse branch is better than randomly chosen tokens (+26.3 [+22.0, +31.0])" in words
    assert "it cannot be told apart, the interval containing 0, from the tokens of the gold boxes (−1.7 [" in words
    assert "mean IoU of 0.55, 0.31 before training" in words
    assert "2.01 times the 1 s of one dense pass" in words
    assert "does not show" not in words


@pytest.mark.parametrize(
    ("ci", "phrase"),
    [
        ([0.98, 1.10], "a difference from the base model is not shown"),
        ([1.0, 1.10], "a difference from the base model is not shown"),
        ([1.01, 1.10], "is better than the base model"),
        ([0.90, 0.99], "is worse than the base model"),
        (None, "chance is not excluded"),
    ],
)
def test_relative_performance_is_claimed_only_with_its_interval(results, ci, phrase):
    words = text({**results, "relative_performance_ci": ci})
    phrases = ["is not shown", "better than the base", "worse than the base", "chance is not"]
    assert phrase in words
    assert sum(p in words for p in phrases) == 1


@pytest.mark.parametrize(
    ("row", "phrase", "shown"),
    [
        ({"difference": 0.05, "ci": [0.01, 0.09]}, "is better than randomly", True),
        (
            {"difference": 0.05, "ci": [-0.01, 0.11]},
            "cannot be told apart, the interval containing 0, from rand",
            False,
        ),
        ({"difference": -0.05, "ci": [-0.09, -0.01]}, "is worse than randomly", False),
        ({"difference": 0.05, "ci": None}, "was compared, without an interval, with randomly", False),
    ],
)
def test_the_random_control_decides_what_the_run_shows(results, row, phrase, shown):
    words = text({**results, "comparisons": [{"a": "sparse", "b": "random", **row}]})
    assert phrase in words
    assert ("does not show that choosing tokens by boxes beats choosing at random" not in words) is shown


@pytest.mark.parametrize(
    ("row", "count", "phrase"),
    [
        ({"p_value": 0.5, "num_questions": 2}, 600, "on fewer than 6 questions, from randomly"),
        ({"p_value": 0.01, "num_questions": 5}, 600, "on fewer than 6 questions, from randomly"),
        ({"p_value": None}, 5, "on fewer than 6 questions, from randomly"),
        ({"p_value": 0.125, "num_questions": 8}, 600, "McNemar's p being 0.05 or more, from randomly"),
        ({"p_value": 0.04, "num_questions": 8}, 600, "is better than randomly"),
        ({"p_value": 0.04}, None, "is better than randomly"),
    ],
)
def test_no_verdict_from_few_questions_or_against_the_test(results, row, count, phrase):
    gap = {"a": "sparse", "b": "random", "difference": 0.5, "ci": [0.125, 0.875], **row}
    words = text({**results, "num_questions": count, "comparisons": [gap]})
    assert phrase in words
    assert ("is better than randomly" in words) is phrase.startswith("is better")
    assert ("does not show that choosing tokens by boxes" in words) is not phrase.startswith("is better")


@pytest.mark.parametrize(
    ("row", "count", "phrase"),
    [
        (
            {"p_value": 0.125, "num_questions": 8},
            8,
            "But p = 0.125 (McNemar): a difference from the base model is not",
        ),
        (
            {"p_value": 0.5, "num_questions": 2},
            2,
            "With fewer than 6 questions, a difference from the base model is not",
        ),
        ({"p_value": 0.01, "num_questions": 600}, 600, "is better than the base model"),
    ],
)
def test_relative_performance_heeds_the_test_and_the_number_of_questions(results, row, count, phrase):
    gap = {"a": "sparse", "b": "base_dense", "difference": 0.1, "ci": [0.01, 0.2], **row}
    assert phrase in text({**results, "num_questions": count, "comparisons": [gap]})


def test_without_a_base_model_nothing_is_said_of_training(results):
    words = text({**results, "base_dense_accuracy": None, "relative_performance": None})
    assert "On 600 questions of phantom/test, the sparse branch answered 68.3% correctly and saw 24.1%" in words
    assert "There is no base model to compare it with." in words
    assert "After training" not in words
    assert "–" not in words


def test_missing_controls_are_said_to_be_missing(results):
    controls = {key: None for key in results if key.startswith("control_")}
    assert "No control was run" in text({**results, **controls, "comparisons": []})
    only_random = {**results, "control_random_accuracy": None, "comparisons": results["comparisons"][1:]}
    assert "Without the random control it is unknown" in text(only_random)


def test_a_large_budget_is_a_warning(results):
    assert "even a random choice loses little" not in text(results)
    assert "even a random choice loses little" in text({**results, "kept_ratio": 0.77})


def test_all_null_is_still_a_sentence(results):
    paragraphs = summary(dict.fromkeys(results))
    assert len(paragraphs) == 2
    assert "None" not in " ".join(paragraphs)
