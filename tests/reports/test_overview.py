"""The first screen of a report."""

import itertools

import pytest

from vitos.reports import overview
from vitos.reports.overview import accuracy_figure, big_numbers


def contrast(a, b):
    """WCAG 2.1: ratio of the relative luminances of two `#rrggbb`."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    "colour", [overview.OWN, overview.GOLD, overview.ALL_TOKENS, overview.CONTROL, *overview._COLOURS.values()]
)
def test_names_in_the_figure_have_the_contrast_of_text(colour):
    assert contrast(colour, "#fbfbfa") >= 4.5


def test_numbers_are_those_of_the_results(results):
    right, kept, gap = big_numbers(results)
    assert (right.value, right.detail) == ("68.3%", "The base model with all tokens: 61.2%.")
    assert (kept.value, gap.value) == ("24.1%", "+26.3")
    assert gap.detail == "95% interval +22.0 to +31.0."
    del results["control_random_accuracy"], results["comparisons"]
    assert big_numbers(results)[2].text == "points against the base model with all tokens"
    assert big_numbers({}) == []


@pytest.mark.parametrize("size", [(6.4, 3.6), (3.5, 3.9)])
def test_figure_shows_every_condition_with_its_interval(results, size):
    axes = accuracy_figure(results, size).axes[0]
    names = {text.get_text().strip() for text in axes.texts}
    assert names == {"base, all tokens  61.2%", "own boxes  68.3%", "random  42.0%", "gold boxes  70.0%"}
    lines = [line.get_xydata() for line in axes.lines]
    bars = {tuple(line[:, 1]) for line in lines if len(line) == 2 and line[0, 0] == line[1, 0]}
    assert {(0.57, 0.65), (0.64, 0.72), (0.38, 0.46)} <= bars
    marks = sorted(tuple(line[0]) for line in lines if len(line) == 1)
    assert sorted(y for _, y in marks) == [0.42, 0.612, 0.683, 0.7]
    # Own boxes and random saw the same share: next to each other, neither on top of the other, both near it.
    own, random = (x for x, y in marks if y in (0.683, 0.42))
    assert 0 < abs(own - random) < 0.05
    assert (own + random) / 2 == pytest.approx(0.241, abs=0.03)


def test_labels_do_not_overlap(results):
    row = {"num_questions": 9, "accuracy": 0.5, "ci": [0.4, 0.6], "kept_ratio": 0.2}
    results["conditions"] = dict.fromkeys(("sparse", "random", "centre", "shifted", "inverted", "oracle"), row)
    figure = accuracy_figure(results)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_without_conditions_there_is_no_figure(results):
    del results["conditions"]
    assert accuracy_figure(results) is None
