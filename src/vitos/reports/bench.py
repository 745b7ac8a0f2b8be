"""A bench's figures as JSON, CSV, Markdown and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.eval.conditions import ABLATIONS, DENSE, OWN
from vitos.eval.figures import ALL
from vitos.eval.selectors import SELECTORS
from vitos.reports import values as v
from vitos.reports.card import RESEARCH_ONLY
from vitos.reports.curves import COLOURS, GREY
from vitos.reports.table import Sheet

RESULTS, ROWS, GROUPS, TABLES, PAGE = "results.json", "rows.csv", "groups.csv", "tables.md", "report.html"
_STAGES = ("open", "vision", "select", "prefill", "decode")
_MARKS = "osD^vPX*<>hpd"
Json = Mapping[str, Any]


def write_bench(out: Path, results: Json) -> None:
    """Write all files of a bench's report to `out`, each whole or not at all."""
    sheets = bench_sheets(results)
    pictures = {}
    for model in results["models"]:
        figure = pareto(results, model)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=170)
            pictures[model] = base64.b64encode(buffer.getvalue()).decode("ascii")
    write_json_atomic(out / RESULTS, dict(results))
    write_text_atomic(out / ROWS, _csv([_flat(row) for row in results["rows"]]))
    write_text_atomic(out / GROUPS, _csv([_flat(row) for row in results["groups"]]))
    write_text_atomic(out / TABLES, "\n\n".join(sheet.markdown() for sheet in sheets) + "\n")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("vitos.reports").joinpath("bench.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(sheets=sheets, pictures=pictures, research_only=RESEARCH_ONLY)
    write_text_atomic(out / PAGE, page)


# --- tables ---------------------------------------------------------------------------------------------------------


def bench_sheets(results: Json) -> list[Sheet]:
    """All tables, in the order of reading."""
    sheets = [_asked(results)]
    for model, span in _parts(results):
        rows = [row for row in results["rows"] if (row["model"], row["benchmark"]) == (model, span)]
        where = f"{model} · {'average of all benchmarks' if span == ALL else span}"
        sheets += [_accuracies(where, rows), _looks(where, rows)]
    sheets += [sheet for model in results["models"] for sheet in _grouped(results, model)]
    sheets += [_times(part) for part in results["seconds"]]
    return [sheet for sheet in sheets if sheet.rows]


def condition_label(condition: str) -> str:
    """What a reader sees for a condition."""
    selector, _, budget = condition.partition("@")
    if condition == DENSE:
        return "All tokens"
    if selector in ABLATIONS:
        return ABLATIONS[selector]
    title = SELECTORS[selector].title if selector in SELECTORS else selector
    return f"{title}, {'own budget' if budget == OWN else f'{100 * float(budget):g}%'}"


def _asked(results: Json) -> Sheet:
    rows = tuple(
        (name, *(str(facts[key]) for key in ("questions", "outside_protocol", "left_out")))
        for name, facts in results["benchmarks"].items()
    )
    note = (
        f"Protocol {results['settings']['protocol']}. Left out: rows of the release that cannot be used. "
        "An answer that cannot be read is wrong. Intervals: 95%, paired bootstrap over questions; p: exact McNemar."
    )
    return Sheet("Benchmarks", ("Benchmark", "Questions", "Outside of the protocol", "Left out"), rows, note)


def _accuracies(where: str, rows: Sequence[Json]) -> Sheet:
    shown = [row for row in rows if row["selector"] not in ABLATIONS]
    table = tuple(
        (
            condition_label(row["condition"]),
            str(row["num_questions"]),
            v.percent(row["accuracy"]) + _interval(row["accuracy_ci"], v.percent_interval),
            v.percent(row["relative"]) + _interval(row["relative_ci"], v.percent_interval),
            v.percent(row["kept_ratio"]),
            v.decimal(row["iou"]),
            v.percent(row["fallback_rate"]),
            v.percent(row["no_answer_rate"]),
            _difference(row["vs_dense"]),
            _difference(row["vs_random"]),
        )
        for row in shown
    )
    columns = ("Tokens", "Questions", "Accuracy", "Relative", "Kept", "IoU", "Without box", "Unread")
    note = "Relative: ratio to the base model's accuracy on all tokens. Random: at the same budget."
    return Sheet(where, (*columns, "Minus dense", "Minus random"), table, note)


def _looks(where: str, rows: Sequence[Json]) -> Sheet:
    """One line: the accuracy of every look beside that on the whole picture."""
    wanted = {DENSE: "All tokens", **ABLATIONS, f"policy@{OWN}": "Own boxes", f"inverted@{OWN}": "Boxes inverted"}
    found = {row["condition"]: row for row in rows}
    if not found.keys() & ABLATIONS.keys():
        return Sheet(where, ("",), ())
    names = [name for name in wanted if name in found]
    lines = (
        ("Accuracy", *(v.percent(found[name]["accuracy"]) for name in names)),
        ("Minus dense", *(_difference(found[name]["vs_dense"]) for name in names)),
        ("Questions", *(str(found[name]["num_questions"]) for name in names)),
    )
    note = (
        "Answers should fall without the picture, with another one and without the evidence, and hold without the "
        "surroundings. Painted over: gold boxes where a question has them, else the model's own."
    )
    return Sheet(f"Does it look? {where}", ("", *(wanted[name] for name in names)), lines, note)


def _grouped(results: Json, model: str) -> list[Sheet]:
    """Accuracy by modality, question type and so on: one row a value, one column a condition."""
    rows = [row for row in results["groups"] if row["model"] == model]
    sheets = []
    for benchmark, by in dict.fromkeys((row["benchmark"], row["by"]) for row in rows):
        part = [row for row in rows if (row["benchmark"], row["by"]) == (benchmark, by)]
        conditions = list(dict.fromkeys(row["condition"] for row in part))
        lines = []
        for value in dict.fromkeys(row["value"] for row in part):
            own = {row["condition"]: row for row in part if row["value"] == value}
            count = max(row["num_questions"] for row in own.values())
            cells = (v.percent(own[c]["accuracy"]) if c in own else v.DASH for c in conditions)
            lines.append((value or "(none)", str(count), *cells))
        columns = (by.replace("_", " ").capitalize(), "Questions", *map(condition_label, conditions))
        sheets.append(Sheet(f"{model} · {benchmark} by {by.replace('_', ' ')}", columns, tuple(lines)))
    return sheets


def _times(part: Json) -> Sheet:
    lines = []
    for condition, stages in part["per_question"].items():
        name = {"images": "Images, once", "localize": "Localization"}.get(condition)
        cells = (v.seconds(stages[s]) if s in stages else v.DASH for s in _STAGES)
        lines.append((name or condition_label(condition), *cells, v.seconds(sum(stages.values()))))
    share = v.percent(part["model_share"])
    note = (
        f"{v.seconds(part['wall'])} in all processes, {share} of it inside the model (encoder, prefill, decode). "
        "Own boxes and crops also need the localization."
    )
    columns = ("Tokens", *(stage.capitalize() for stage in _STAGES), "Sum")
    return Sheet(f"Time per question · {part['model']} · {part['benchmark']}", columns, tuple(lines), note)


# --- figure ---------------------------------------------------------------------------------------------------------


def pareto(results: Json, model: str) -> Figure | None:
    """Accuracy over the share of tokens kept, one line a selector; None without budgets below 1."""
    spans = [span for name, span in _parts(results) if name == model]
    if not spans:
        return None
    span = ALL if ALL in spans else spans[0]
    rows = [row for row in results["rows"] if (row["model"], row["benchmark"]) == (model, span)]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["selector"] in SELECTORS and row["budget"] != OWN:
            curves.setdefault(row["selector"], []).append((row["kept_ratio"], row["accuracy"]))
    if not curves:
        return None
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (selector, points) in enumerate(curves.items()):
        xs, ys = zip(*sorted(points), strict=True)
        colour, mark = COLOURS[index % len(COLOURS)], _MARKS[index % len(_MARKS)]
        width = 2.4 if selector == "policy" else 1.1
        axes.plot(xs, ys, color=colour, marker=mark, markersize=4.5, lw=width, label=SELECTORS[selector].title)
    _decorate(axes, rows, f"{model}: {'average of all benchmarks' if span == ALL else span}")
    return figure


def _decorate(axes: Axes, rows: Sequence[Json], title: str) -> None:
    for row in rows:
        if row["condition"] == DENSE:
            axes.axhline(row["accuracy"], color=GREY, lw=1.2, ls=(0, (4, 3)), label="All tokens")
        elif row["condition"] == f"policy@{OWN}":
            own = f"Own boxes, own budget ({v.percent(row['kept_ratio'])})"
            axes.plot([row["kept_ratio"]], [row["accuracy"]], ls="", marker="*", ms=12, mfc="white", label=own)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", color="#d9dce2", lw=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


# --- writing --------------------------------------------------------------------------------------------------------


def _parts(results: Json) -> list[tuple[str, str]]:
    """(model, benchmark or `all`) for which there are rows; the average first."""
    found = list(dict.fromkeys((row["model"], row["benchmark"]) for row in results["rows"]))
    return sorted(found, key=lambda part: (list(results["models"]).index(part[0]), part[1] != ALL))


def _interval(pair: Sequence[float] | None, write: Any) -> str:
    return f" ({write(v.Interval(*pair))})" if pair else ""


def _difference(gap: Json | None) -> str:
    if gap is None:
        return v.DASH
    return f"{v.points(gap['difference'])} ({v.points_interval(v.Interval(*gap['ci']))}, {v.p_value(gap['p_value'])})"


def _flat(row: Json) -> dict[str, Any]:
    """One level of keys: `vs_dense.difference`, `accuracy_ci.low`."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}.{name}": part for name, part in _flat(value).items()}
        elif isinstance(value, list):
            out |= {f"{key}.low": value[0], f"{key}.high": value[1]}
        else:
            out[key] = value
    return out


def _csv(rows: Sequence[Json]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    # A figure of several parts that a row lacks is one empty cell there: its parts are the columns.
    columns = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    # A cell that begins like a formula is one to a spreadsheet; names of models and data sets are untrusted.
    writer.writerows(
        {k: f"'{x}" if isinstance(x, str) and x[:1] in "=+-@" else x for k, x in row.items()} for row in rows
    )
    return text.getvalue()
