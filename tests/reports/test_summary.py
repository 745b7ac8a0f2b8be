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
