"""The first screen of an evaluation's report: one figure, three numbers in plain words, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitos.reports import values as v
from vitos.reports.curves import GREY, blank_figure, finish

OWN, GOLD, ALL_TOKENS, CONTROL = "#0069A5", "#00714F", "#22262e", "#A84300"
"""Colours by what a condition is: the model's own choice, gold boxes, all tokens, a control in the same number."""
_COLOURS = {"sparse": OWN, "untrained_sparse": "#3A6784", "oracle": GOLD}
_MARKS = {"sparse": "o", "untrained_sparse": "P", "oracle": "D"}
_SHORT = {
    "base_dense": "base, all tokens",
    "dense": "trained, all tokens",
    "localization": "localization",
    "sparse": "own boxes",
    "untrained_sparse": "own boxes, untrained",
    "random": "random",
    "shifted": "boxes moved",
    "centre": "centre",
    "inverted": "outside the boxes",
    "oracle": "gold boxes",
    "rl_dense": "RL without pruning",
    "evidence_head": "evidence head",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BigNumber:
    """A figure of the first screen: the value and what it says."""

    value: str
    text: str
    detail: str = ""


def big_numbers(results: Mapping[str, Any]) -> list[BigNumber]:
    """How often it is right, from how many tokens, and what the choice of tokens is worth, as far as known."""
    numbers = []
    sparse, kept = v.accuracy(results, "sparse"), v.share(results, "kept_ratio")
    if sparse is not None:
        dense = v.accuracy(results, "base_dense")
        detail = "" if dense is None else f"The base model with all tokens: {v.percent(dense)}."
        numbers.append(BigNumber(value=v.percent(sparse), text="right, from its own boxes only", detail=detail))
    if kept is not None:
        fallback = v.share(results, "fallback_rate")
        detail = "" if fallback is None else f"On {v.percent(fallback)} of the questions it fell back to all of them."
        numbers.append(BigNumber(value=v.percent(kept), text="of the visual tokens seen", detail=detail))
    for control, against in (("random", "as many random tokens"), ("base_dense", "the base model with all tokens")):
        gap = v.difference(results, "sparse", control)
        if gap is not None:
            ends = f"95% interval {v.points_interval(gap.interval)}." if gap.interval else "No interval was computed."
            numbers.append(BigNumber(value=v.points(gap.estimate), text=f"points against {against}", detail=ends))
            break
    return numbers


@dataclass(slots=True, kw_only=True)
class _Point:
    name: str
    kept: float
    accuracy: float
    ends: v.ConfidenceInterval | None
    x: float = 0.0
    label: float = 0.0


def accuracy_figure(results: Mapping[str, Any], size: tuple[float, float] = (6.4, 3.6)) -> Figure | None:
    """Accuracy over the share of tokens kept, each condition with its interval and its name; None without conditions.

    Conditions with the same share are drawn next to each other instead of on top of each other.

    Args:
        results: content of `results.json`.
        size: width and height in inches; 100 CSS pixels each in the report.
    """
    points = _points(results)
    if not points:
        return None
    step = 0.12 / size[0]
    _spread(points, step)
    ends = [end for p in points for end in (p.ends or (p.accuracy,))]
    low, high = max(0.0, min(ends) - 0.04), min(1.0, max(ends) + 0.04)
    figure = blank_figure(*size)
    axes = figure.add_subplot()
    finish(axes, "")
    axes.set_ylim(low, high)
    _place_labels(points, gap=(high - low) * 0.19 / (size[1] - 0.8), low=low, high=high)
    right, points_left = max(p.x for p in points) + step, min(p.x for p in points)
    for point in points:
        colour = _COLOURS.get(point.name, ALL_TOKENS if point.kept == 1 else CONTROL)
        if point.ends:
            axes.plot([point.x] * 2, point.ends, color=colour, lw=1.6, alpha=0.75, solid_capstyle="butt")
        mark = _MARKS.get(point.name, "o" if point.kept == 1 else "s")
        axes.plot([point.x], [point.accuracy], marker=mark, ms=7 if point.name == "sparse" else 5.5, color=colour)
        axes.plot([point.x, right + step], [point.accuracy, point.label], color=colour, lw=0.5, alpha=0.5)
        text = f" {_SHORT.get(point.name, v.label(point.name))}  {v.percent(point.accuracy)}"
        weight = "bold" if point.name == "sparse" else "normal"
        axes.text(right + step, point.label, text, color=colour, fontsize=8.5, va="center", weight=weight)
    axes.set_xlim(min(0.0, points_left - step), right)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("right answers", color=GREY, fontsize=8.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _points(results: Mapping[str, Any]) -> list[_Point]:
    points = []
    for name, row in (results.get("conditions") or {}).items():
        accuracy, kept = v.share(row, "accuracy"), v.share(row, "kept_ratio")
        if accuracy is not None and kept is not None and name != "untrained_localization":
            points.append(_Point(name=name, kept=kept, accuracy=accuracy, ends=v.interval(row, "ci")))
    return points


def _spread(points: Sequence[_Point], step: float) -> None:
    """Set `x`: the share kept; those with nearly the same share are put next to each other, around it."""
    order = sorted(points, key=lambda p: (p.kept, -p.accuracy))
    groups: list[list[_Point]] = []
    for point in order:
        if groups and point.kept - groups[-1][-1].kept < step:
            groups[-1].append(point)
        else:
            groups.append([point])
    taken = -step
    for group in groups:
        middle = sum(point.kept for point in group) / len(group)
        for index, point in enumerate(group):
            point.x = taken = max(middle + (index - (len(group) - 1) / 2) * step, taken + step)


def _place_labels(points: Sequence[_Point], *, gap: float, low: float, high: float) -> None:
    """Set `label`: as near to the accuracy as a distance of `gap` between labels allows, within the axes."""
    order = sorted(points, key=lambda p: (p.accuracy, p.name == "sparse"))
    below = low - gap / 2
    for point in order:
        point.label = below = max(point.accuracy, below + gap)
    above = high + gap / 2
    for point in reversed(order):
        point.label = above = min(point.label, above - gap)
