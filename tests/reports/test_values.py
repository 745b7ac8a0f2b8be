"""Figures read from the results, and how they are written."""

import math

import pytest

from vitos.reports import values as v


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (v.percent, 0.683, "68.3%"),
        (v.percent, None, "–"),
        (v.percent, 0.0, "0.0%"),
        (v.points, 0.0514, "+5.1"),
        (v.points, -0.05, "−5.0"),
        (v.points, -0.0001, "0.0"),
        (v.points, None, "–"),
        (v.decimal, 0.555, "0.56"),
        (v.p_value, 0.0004, "p < 0.001"),
        (v.p_value, 0.0312, "p = 0.031"),
        (v.seconds, 0.0123, "12.3 ms"),
        (v.seconds, 1.2345, "1.23 s"),
        (v.seconds, 0.0, "0 s"),
        (v.seconds, 12345.6, "12346 s"),
        (v.seconds, None, "–"),
        (v.percent_interval, (0.2, 0.314), "20.0% to 31.4%"),
        (v.points_interval, [-0.01, 0.04], "−1.0 to +4.0"),
        (v.points_interval, None, "–"),
    ],
)
def test_figures_as_text(write, value, text):
    assert write(value) == text


@pytest.mark.parametrize(("value", "read"), [(None, None), (math.nan, None), (math.inf, None), (1, 1.0), (0.25, 0.25)])
def test_numbers_that_are_not_known_are_none(value, read):
    assert v.number({"key": value}, "key") == read
    assert v.number({}, "key") is None


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_a_figure_of_another_type_is_named(value):
    with pytest.raises(v.ResultsError, match="'mean_iou' must be a number"):
        v.number({"mean_iou": value}, "mean_iou")


def test_per_cent_where_a_fraction_is_due_is_refused():
    with pytest.raises(v.ResultsError, match=r"'sparse_accuracy' must be a fraction 0\.\.1, got 68\.3"):
        v.accuracy({"sparse_accuracy": 68.3}, "sparse")


@pytest.mark.parametrize("pair", [0.5, [0.5], "ab", [1, 2, 3]])
def test_an_interval_is_a_pair(pair):
    with pytest.raises(v.ResultsError, match="'ci'"):
        v.interval({"ci": pair}, "ci")


def test_an_interval_with_an_unknown_end_is_unknown():
    assert v.interval({"ci": [0.1, None]}, "ci") is None


def test_difference_turns_round_a_comparison_listed_the_other_way(results):
    gap = v.difference(results, "sparse", "oracle")
    assert gap == v.Difference(estimate=-0.017, interval=v.ConfidenceInterval(-0.04, 0.01), p_value=0.21)


def test_difference_without_comparison_has_no_interval(results):
    gap = v.difference(results, "sparse", "centre")
    assert gap is not None
    assert gap.estimate == pytest.approx(0.233)
    assert gap.interval is None
    assert v.difference(results, "sparse", "rl_dense") is None


def test_field_names_of_the_file_name_conditions_too():
    assert v.condition_name("control_random_accuracy") == "random"
    assert v.label("sparse_accuracy") == v.LABELS["sparse"]
    assert v.label("crop_again") == "Crop again"
