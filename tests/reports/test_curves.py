"""Curves of a run against their figures, and against a mean computed by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitos.reports.curves import pareto, running_mean, training_curves


def rows(count=20, **extra):
    return [
        {"step": i + 1, "stage": 1.0 if i < count // 2 else 2.0, "reward/localization": i / count, "iou": 0.5, **extra}
        for i in range(count)
    ]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def dots(axes):
    """Raw values of every metric of a panel."""
    return [line for line in axes.lines if line.get_marker() == "."]


def test_only_panels_with_metrics_are_drawn():
    assert titles(training_curves(rows())) == ["Rewards", "Boxes: IoU and tokens kept"]
    more = rows(**{"accuracy/sparse": 0.4, "gradient_cosine": -0.1, "group_std/reasoning": 0.2, "parse_rate": 1.0})
    assert len(titles(training_curves(more))) == 6


def test_raw_values_are_drawn_where_they_belong():
    metrics = rows(4)
    metrics[1]["iou"] = math.nan
    del metrics[2]["iou"]
    reward, iou = training_curves(metrics).axes
    assert dots(reward)[0].get_xydata().tolist() == [[1, 0], [2, 0.25], [3, 0.5], [4, 0.75]]
    assert np.isnan(dots(iou)[0].get_ydata()).tolist() == [False, True, True, False]


def test_a_change_of_stage_is_a_line_and_breaks_the_mean():
    axes = training_curves(rows(20)).axes[0]
    vertical = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]
    assert [line.get_xdata()[0] for line in vertical] == [10.5]
    means = [line for line in axes.lines if line not in dots(axes) and line not in vertical]
    assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in means] == [(1, 10), (11, 20)]
    assert [text.get_text().strip() for text in axes.texts] == ["stage 1", "stage 2"]


def test_a_stage_that_counts_its_steps_from_the_start_is_drawn_after_the_one_before():
    metrics = [{"step": s, "stage": stage, "iou": 0.5} for stage in ("localization", "reasoning") for s in (1, 2, 3)]
    assert dots(training_curves(metrics).axes[0])[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]


def test_text_and_flags_are_no_metrics():
    assert titles(training_curves(rows(branch="reasoning", **{"reward/note": "x", "parse_rate": True}))) == [
        "Rewards",
        "Boxes: IoU and tokens kept",
    ]


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": 0.5}]])
def test_nothing_to_draw_is_an_error(metrics):
    with pytest.raises(ValueError, match="no row of the metrics"):
        training_curves(metrics)


def test_a_row_without_step_is_named():
    with pytest.raises(ValueError, match="row 1 of the metrics has no 'step'"):
        training_curves([{"step": 1, "iou": 0.1}, {"iou": 0.2}])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=90))
def test_running_mean_equals_the_mean_of_the_window(values):
    y = np.array(values)
    half = len(y) // 20
    expected = [np.mean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
    assert np.allclose(running_mean(y), expected)


def test_pareto_draws_budgets_in_order_and_the_base_level(results):
    results["budgets"]["0.5"]["random"] = None
    axes = pareto(results).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["Own boxes"] == [[0.1, 0.5], [0.5, 0.65]]
    assert lines["Random tokens"] == [[0.1, 0.3]]
    assert lines["This run, budget free"] == [[0.241, 0.683]]
    assert lines["Base model, all tokens"][0][1] == 0.612
    assert "Centre tokens" not in lines


def test_pareto_without_budgets_says_how_to_get_them(results):
    with pytest.raises(ValueError, match=r"evaluate\.budgets"):
        pareto({**results, "budgets": None})


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_can_be_saved(tmp_path, results, kind):
    for figure in (training_curves(rows()), pareto(results)):
        path = tmp_path / f"figure.{kind}"
        figure.savefig(path)
        assert path.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[kind]
