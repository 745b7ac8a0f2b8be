"""Curves of a training run and of an evaluation at several token budgets, as matplotlib figures.

Figures are made through the object API: no pyplot, no global state, no display. The caller saves them
(`figure.savefig("curves.svg")`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from vitos.reports import values as v

# Okabe–Ito without its yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Colour and mark of each way to choose tokens.
CONDITION_STYLE = {
    "sparse": ("#0072B2", "o"),
    "oracle": ("#009E73", "D"),
    "random": ("#D55E00", "s"),
    "centre": ("#E69F00", "^"),
    "inverted": ("#CC79A7", "v"),
}
GREY = "#5f6672"


@dataclass(frozen=True, slots=True)
class Panel:
    """One small multiple: metrics by exact key, or by a prefix that ends in `/`; `unit` spans the y axis over 0..1."""

    title: str
    keys: tuple[str, ...]
    unit: bool = False

    def found(self, available: Sequence[str]) -> list[str]:
        """Metrics of this panel among `available`, in the order of `keys`."""
        return [a for key in self.keys for a in available if a == key or (key.endswith("/") and a.startswith(key))]


PANELS = (
    Panel("Rewards", ("reward/",)),
    Panel("Accuracy of both branches", ("accuracy/",), unit=True),
    Panel("Boxes: IoU and tokens kept", ("iou", "kept_ratio"), unit=True),
    Panel("Fallback and parse rates", ("fallback_rate", "parse_rate"), unit=True),
    Panel("Standard deviation within a group", ("group_std", "group_std/")),
    Panel("Cosine of both branches' gradients", ("gradient_cosine",)),
)
NAMES = {"iou": "mean IoU", "kept_ratio": "tokens kept", "fallback_rate": "fallback", "parse_rate": "boxes parsed"}


def training_curves(metrics: Sequence[Mapping[str, Any]], columns: int = 3) -> Figure:
    """Small multiples of a run: raw values as dots, a centred running mean within each stage as a line.

    Panels without a metric are left out. A change of stage is a vertical line; where a stage counts its steps from the
    start again, it is drawn after the stage before it.

    Args:
        metrics: rows of `metrics.jsonl` in the order of the file; a row may hold any subset of the metrics.
        columns: largest number of panels next to each other.

    Raises:
        ValueError: if no row holds a metric that a panel shows, or a row has no `step`.
    """
    available = list(dict.fromkeys(key for row in metrics for key, value in row.items() if _is_figure(value)))
    panels = [(panel, found) for panel in PANELS if (found := panel.found(available))]
    if not panels:
        raise ValueError("no row of the metrics holds a reward, accuracy, IoU, rate or group figure to draw")
    x, stages = _timeline(metrics)
    changes = [i for i, (a, b) in enumerate(pairwise(stages), start=1) if a != b]

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = blank_figure(3.7 * columns, 2.7 * rows)
    for index, (panel, found) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for key, colour in zip(found, cycle(COLOURS), strict=False):
            _draw_metric(axes, x, metrics, key, changes, colour)
        _draw_stages(axes, x, stages, changes, with_names=index == 0)
        finish(axes, panel.title)
        axes.set_xlim(float(x.min()) - 0.5, float(x.max()) + 0.5)
        if panel.unit:
            axes.set_ylim(-0.03, 1.03)
        if index >= len(panels) - columns:
            axes.set_xlabel("step")
        if len(found) > 1:
            axes.legend(fontsize=7.5, frameon=False, labelcolor=GREY, loc="best", handlelength=1.2)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetCurve:
    """Accuracy of one way of choosing tokens at several budgets.

    Attributes:
        points: (share of visual tokens kept, accuracy), both 0..1, in any order.
        marker: matplotlib's letter for the mark at each point.
        main: the curve that the figure is about; it is drawn thicker.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    marker: str
    main: bool = False


def pareto(results: Mapping[str, Any], size: tuple[float, float] = (6.6, 3.6)) -> Figure:
    """Accuracy over the share of tokens kept, a curve for each way of choosing them; the base model as a level.

    Args:
        results: content of `results.json` with `budgets`; the run's own point is drawn from `kept_ratio`.
        size: width and height in inches.

    Raises:
        ValueError: if there are no budgets.
    """
    budgets = results.get("budgets") or {}
    if not budgets:
        raise ValueError("the results hold no budgets; evaluate with evaluate.budgets=[0.75, 0.5, 0.25, 0.1]")
    curves = []
    for condition, (colour, marker) in CONDITION_STYLE.items():
        points = []
        for budget, row in budgets.items():
            kept, value = v.share(row, "kept_ratio"), v.share(row, condition)
            if value is not None:
                points.append((float(budget) if kept is None else kept, value))
        main = condition == "sparse"
        label = "Own boxes" if main else v.label(condition)
        curves.append(BudgetCurve(label=label, points=points, colour=colour, marker=marker, main=main))
    own = ("This run, budget free", v.share(results, "kept_ratio"), v.accuracy(results, "sparse"))
    level = (v.label("base_dense"), v.accuracy(results, "base_dense"))
    return draw_pareto("Accuracy at equal token budgets", curves, own, level, size)


def draw_pareto(
    title: str,
    curves: Sequence[BudgetCurve],
    own: tuple[str, float | None, float | None],
    level: tuple[str, float | None],
    size: tuple[float, float] = (6.6, 3.6),
) -> Figure:
    """Accuracy over the share of visual tokens kept.

    Args:
        curves: those without points are left out.
        own: label, share of tokens kept and accuracy of the answers from the model's own boxes; None: not known.
        level: label and accuracy of the answers from all tokens; None: not known.
        size: width and height in inches; the legend is to the right of a wide figure and below a narrow one.
    """
    figure = blank_figure(*size)
    axes = figure.add_subplot()
    for curve in (curve for curve in curves if curve.points):
        xs, ys = zip(*sorted(curve.points), strict=True)
        width = 2.4 if curve.main else 1.4
        axes.plot(xs, ys, color=curve.colour, marker=curve.marker, markersize=5, lw=width, label=curve.label)
    label, kept, value = own
    if kept is not None and value is not None:
        axes.plot([kept], [value], ls="", marker="*", ms=13, mfc="white", mec=COLOURS[0], label=label)
    if level[1] is not None:
        axes.axhline(level[1], color=GREY, lw=1.2, ls=(0, (4, 3)), label=level[0])
    finish(axes, title)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("accuracy", color=GREY, fontsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    place = {"loc": "outside right center"} if size[0] > 5 else {"loc": "outside lower left", "ncols": 2}
    figure.legend(fontsize=8, frameon=False, labelcolor=GREY, **place)
    return figure


def _timeline(metrics: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.float64], list[str]]:
    """Position of each row on one axis, shape (rows,), and its stage."""
    positions: list[float] = []
    stages: list[str] = []
    offset = 0.0
    for index, row in enumerate(metrics):
        step = v.number(row, "step")
        if step is None:
            raise v.ResultsError(f"row {index} of the metrics has no 'step'")
        stage = _stage_name(row.get("stage"))
        if stages and stage != stages[-1] and step + offset <= positions[-1]:
            offset = positions[-1] + 1 - step
        positions.append(step + offset)
        stages.append(stage)
    return np.array(positions), stages


def _stage_name(stage: object) -> str:
    """`2.0` → `stage 2`; a log across two stages holds the mean of their numbers and belongs to the nearer one."""
    return f"stage {round(stage)}" if isinstance(stage, int | float) else str(stage or "")


def _draw_metric(
    axes: Axes,
    x: NDArray[np.float64],
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    changes: Sequence[int],
    colour: str,
) -> None:
    y = np.array([math.nan if (value := v.number(row, key)) is None else value for row in metrics])
    axes.plot(x, y, ls="", marker=".", ms=3, mew=0, color=colour, alpha=0.35)
    name = NAMES.get(key, key.split("/", 1)[-1].replace("_", " "))
    for start, end in pairwise([0, *changes, len(y)]):
        known = np.flatnonzero(np.isfinite(y[start:end])) + start
        if known.size:
            axes.plot(x[known], running_mean(y[known]), color=colour, lw=1.7, label=name)
            name = "_nolegend_"


def running_mean(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a tenth of the values, at both ends over the values that exist. Same shape as `y`."""
    half = len(y) // 20
    kernel = np.ones(2 * half + 1)
    middle = slice(half, half + len(y))
    return np.asarray(np.convolve(y, kernel)[middle] / np.convolve(np.ones(len(y)), kernel)[middle])


def _draw_stages(
    axes: Axes, x: NDArray[np.float64], stages: Sequence[str], changes: Sequence[int], *, with_names: bool
) -> None:
    for change in changes:
        axes.axvline(float(x[change - 1] + x[change]) / 2, color=GREY, lw=1, ls=(0, (2, 2)))
    if with_names and changes:
        for start in (0, *changes):
            transform = axes.get_xaxis_transform()
            axes.text(float(x[start]), 0.01, f" {stages[start]}", transform=transform, fontsize=7, color=GREY)


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, laid out when it is saved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, title: str) -> None:
    """Title, grid and colours as in all figures of a report."""
    axes.set_title(title, fontsize=9.5, loc="left", color="#22262e")
    axes.grid(axis="y", color="#d9dce2", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, labelcolor=GREY)
    axes.xaxis.label.set(color=GREY, fontsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b6bac2")


def _is_figure(value: object) -> bool:
    """A finite number; text such as the branch, and flags, are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
