"""The figures of a bench as JSON, CSV, Markdown and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitos.data.files import write_json_atomic, write_text_atomic
from vitos.reports import values as v
from vitos.reports.curves import COLOURS, BudgetCurve, draw_pareto
from vitos.reports.page import Section, write_page
from vitos.reports.table import Sheet

RESULTS, ROWS, GROUPS, TABLES, PAGE = "results.json", "rows.csv", "groups.csv", "tables.md", "report.html"
_STAGES = ("open", "vision", "select", "prefill", "decode")
_MARKS = "osD^vPX*<>hpd"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchNames:
    """How the evaluator names what it asked, and what a reader sees for it.

    Attributes:
        selectors: title of each token selector.
        ablations: title of each changed image.
        dense: the condition with all tokens.
        own: the budget of the model's own boxes.
        average: name of the average over all benchmarks.
    """

    selectors: Mapping[str, str]
    ablations: Mapping[str, str]
    dense: str
    own: str
    average: str

    def label(self, condition: str) -> str:
        """What a reader sees for a condition."""
        selector, _, budget = condition.partition("@")
        if condition == self.dense:
            return "All tokens"
        if selector in self.ablations:
            return self.ablations[selector]
        title = self.selectors.get(selector, selector)
        return f"{title}, {'own budget' if budget == self.own else f'{100 * float(budget):g}%'}"

    def span(self, benchmark: str) -> str:
        """What a reader sees for a benchmark, or for all of them together."""
        return "average of all benchmarks" if benchmark == self.average else benchmark


def write_bench(out: Path, results: Mapping[str, Any], names: BenchNames) -> None:
    """Write all files of a bench's report to `out`, each whole or not at all.

    Args:
        results: the figures, see `vitos.eval.figures`.
    """
    sheets = bench_sheets(results, names)
    plots = [
        Section(
            title=f"Accuracy over tokens kept: {model}",
            figure=bench_pareto(results, model, names),
            alt=f"Accuracy of {model} over the share of visual tokens kept, one line for each selector; the figures "
            "are in the tables below.",
        )
        for model in results["models"]
    ]
    write_json_atomic(out / RESULTS, dict(results))
    write_text_atomic(out / ROWS, _csv([_flat(row) for row in results["rows"]]))
    write_text_atomic(out / GROUPS, _csv([_flat(row) for row in results["groups"]]))
    write_text_atomic(out / TABLES, "\n\n".join(sheet.markdown() for sheet in sheets) + "\n")
    write_page(out / PAGE, "vitos bench", [*plots, *(Section(sheet=sheet) for sheet in sheets)])


# --- tables ---------------------------------------------------------------------------------------------------------


def bench_sheets(results: Mapping[str, Any], names: BenchNames) -> list[Sheet]:
    """All tables, in the order of reading."""
    sheets = [_benchmarks(results)]
    for model, span, rows in _parts(results, names):
        where = f"{model} · {names.span(span)}"
        sheets += [_accuracies(where, rows, names), _ablations(where, rows, names)]
    sheets += [sheet for model in results["models"] for sheet in _groups(results, model, names)]
    sheets += [_left_out(results, names), *(_times(part, names) for part in results["seconds"])]
    return [sheet for sheet in sheets if sheet.rows]


def _benchmarks(results: Mapping[str, Any]) -> Sheet:
    keys = ("questions", "outside_protocol", "left_out")
    note = (
        f"Protocol {results['settings']['protocol']}. Left out: rows of the release that cannot be used. "
        "An answer that cannot be read is wrong. Intervals: 95%, paired bootstrap over questions; p: exact McNemar."
    )
    return Sheet(
        title="Benchmarks",
        columns=("Benchmark", "Questions", "Outside of the protocol", "Left out"),
        rows=tuple((name, *(str(row[key]) for key in keys)) for name, row in results["benchmarks"].items()),
        note=note,
    )


def _accuracies(where: str, rows: Sequence[Mapping[str, Any]], names: BenchNames) -> Sheet:
    lines = tuple(
        (
            names.label(row["condition"]),
            str(row["num_questions"]),
            _with_interval(row, "accuracy"),
            _with_interval(row, "relative"),
            v.percent(row["kept_ratio"]),
            v.decimal(row["iou"]),
            v.percent(row["fallback_rate"]),
            v.percent(row["no_answer_rate"]),
            _difference(row["vs_dense"]),
            _difference(row["vs_random"]),
        )
        for row in rows
        if row["selector"] not in names.ablations
    )
    columns = ("Tokens", "Questions", "Accuracy", "Relative", "Kept", "IoU", "Without box", "Unread")
    note = "Relative: ratio to the base model's accuracy on all tokens. Random: at the same budget."
    return Sheet(title=where, columns=(*columns, "Minus dense", "Minus random"), rows=lines, note=note)


def _ablations(where: str, rows: Sequence[Mapping[str, Any]], names: BenchNames) -> Sheet:
    """Accuracy from each changed image, compared with that from the whole image; no rows where none was asked."""
    titles = {names.dense: "All tokens", **names.ablations}
    titles |= {f"policy@{names.own}": "Own boxes", f"inverted@{names.own}": "Boxes inverted"}
    found = {row["condition"]: row for row in rows}
    shown = {title: found[condition] for condition, title in titles.items() if condition in found}
    lines = (
        ("Accuracy", *(v.percent(row["accuracy"]) for row in shown.values())),
        ("Minus dense", *(_difference(row["vs_dense"]) for row in shown.values())),
        ("Questions", *(str(row["num_questions"]) for row in shown.values())),
    )
    note = (
        "Answers should fall without the picture, with another one and without the evidence, and hold without the "
        "surroundings. Painted over: gold boxes where a question has them, else the model's own."
    )
    return Sheet(
        title=f"Does it look? {where}",
        columns=("", *shown),
        rows=lines if found.keys() & names.ablations.keys() else (),
        note=note,
    )


def _groups(results: Mapping[str, Any], model: str, names: BenchNames) -> list[Sheet]:
    """Accuracy by modality, question type and so on: one row per value, one column per condition."""
    tables: dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in (row for row in results["groups"] if row["model"] == model):
        table = tables.setdefault((row["benchmark"], row["by"]), {})
        table.setdefault(row["value"], {})[row["condition"]] = row
    sheets = []
    for (benchmark, by), table in tables.items():
        conditions = list(dict.fromkeys(condition for found in table.values() for condition in found))
        lines = []
        for value, found in table.items():
            count = max(row["num_questions"] for row in found.values())
            cells = (v.percent(found[c]["accuracy"]) if c in found else v.DASH for c in conditions)
            lines.append((value or "(none)", str(count), *cells))
        head = by.replace("_", " ")
        columns = (head.capitalize(), "Questions", *map(names.label, conditions))
        sheets.append(Sheet(title=f"{model} · {benchmark} by {head}", columns=columns, rows=tuple(lines)))
    return sheets


def _left_out(results: Mapping[str, Any], names: BenchNames) -> Sheet:
    """Questions that a condition has no answer to; no rows if there are none."""
    return Sheet(
        title="Left out of a condition",
        columns=("Model", "Benchmark", "Tokens", "Questions"),
        rows=tuple(
            (row["model"], row["benchmark"], names.label(row["condition"]), str(row["num_questions"]))
            for row in results.get("left_out", ())
        ),
        note="Not defined for the question (no box, no gold box), or more tokens than the budget.",
    )


def _times(part: Mapping[str, Any], names: BenchNames) -> Sheet:
    lines = []
    for condition, stages in part["per_question"].items():
        name = {"images": "Images, once", "localize": "Localization"}.get(condition)
        cells = (v.seconds(stages.get(stage)) for stage in _STAGES)
        lines.append((name or names.label(condition), *cells, v.seconds(sum(stages.values()))))
    share = v.percent(part["model_share"])
    note = (
        f"{v.seconds(part['wall'])} in all processes, {share} of it inside the model (encoder, prefill, decode). "
        "Own boxes and crops also need the localization."
    )
    return Sheet(
        title=f"Time per question · {part['model']} · {part['benchmark']}",
        columns=("Tokens", *(stage.capitalize() for stage in _STAGES), "Sum"),
        rows=tuple(lines),
        note=note,
    )


# --- figure ---------------------------------------------------------------------------------------------------------


def bench_pareto(results: Mapping[str, Any], model: str, names: BenchNames) -> Figure | None:
    """Accuracy over the share of tokens kept, a curve for each selector; None without budgets below 1."""
    parts = [(span, rows) for name, span, rows in _parts(results, names) if name == model]
    span, rows = parts[0] if parts else ("", [])
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["selector"] in names.selectors and row["budget"] != names.own:
            points.setdefault(row["selector"], []).append((row["kept_ratio"], row["accuracy"]))
    if not points:
        return None
    curves = [
        BudgetCurve(
            label=names.selectors[selector],
            points=points[selector],
            colour=COLOURS[index % len(COLOURS)],
            marker=_MARKS[index % len(_MARKS)],
            main=selector == "policy",
        )
        for index, selector in enumerate(points)
    ]
    found = {row["condition"]: row for row in rows}
    own, dense = found.get(f"policy@{names.own}", {}), found.get(names.dense, {})
    kept, accuracy = own.get("kept_ratio"), own.get("accuracy")
    return draw_pareto(
        f"{model}: {names.span(span)}",
        curves,
        (f"Own boxes, own budget ({v.percent(kept)})", kept, accuracy),
        ("All tokens", dense.get("accuracy")),
        size=(7.4, 4.2),
    )


# --- writing --------------------------------------------------------------------------------------------------------


def _parts(results: Mapping[str, Any], names: BenchNames) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(model, benchmark or average, its rows), by model, the average first."""
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        parts.setdefault((row["model"], row["benchmark"]), []).append(row)
    order = list(results["models"])
    found = [(model, span, rows) for (model, span), rows in parts.items()]
    return sorted(found, key=lambda part: (order.index(part[0]), part[1] != names.average))


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    """`68.3% (60.1% to 75.0%)`."""
    pair = row[f"{key}_ci"]
    return v.percent(row[key]) + (f" ({v.percent_interval(pair)})" if pair else "")


def _difference(gap: Mapping[str, Any] | None) -> str:
    """`+5.1 (+2.0 to +8.3, p = 0.002)`."""
    if gap is None:
        return v.DASH
    return f"{v.points(gap['difference'])} ({v.points_interval(gap['ci'])}, {v.p_value(gap['p_value'])})"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
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
