"""Tables of an evaluation: described once as `Sheet`s, printed by rich, as Markdown, and in the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from vitos.reports import values as v

STAGES = {
    "vision": "Vision encoder",
    "localize_prefill": "Localize: prefill",
    "localize_decode": "Localize: decode",
    "sparsify": "Sparsify",
    "reason_prefill": "Reason: prefill",
    "reason_decode": "Reason: decode",
    "total": "Both passes",
    "dense_total": "One dense pass",
}


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as text: the first column names the row, the others hold its figures.

    `rows` all have as many cells as `columns`; `note` is one sentence for below the table, or empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """A heading and a pipe table, figures to the right."""
        head = [self.columns, (":--", *["--:"] * (len(self.columns) - 1))]
        lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (*head, *self.rows)]
        return "\n".join([f"### {_cell(self.title)}", "", *lines, *(("", self.note) if self.note else ())])


# --- what is shown --------------------------------------------------------------------------------------------------


def main_sheet(results: Mapping[str, Any]) -> Sheet:
    """Accuracies, relative performance, tokens kept and the quality of the boxes."""
    kept = [v.percent(v.share(results, f"kept_ratio_{p}")) for p in ("p10", "p90")]
    ci = v.interval(results, "relative_performance_ci")
    before = v.share(results, "mean_iou_before")
    rows = (
        (v.label("base_dense"), v.percent(v.accuracy(results, "base_dense")), ""),
        _accuracy_row(results, "localization"),
        _accuracy_row(results, "sparse"),
        (
            "Relative performance (sparse ÷ base)",
            v.percent(v.number(results, "relative_performance")),
            f"95% interval {v.percent_interval(ci)}" if ci else "",
        ),
        (
            "Visual tokens kept",
            v.percent(v.share(results, "kept_ratio")),
            "" if kept == [v.DASH] * 2 else f"p10 {kept[0]}, p90 {kept[1]}",
        ),
        (
            "Mean IoU of the boxes",
            v.decimal(v.share(results, "mean_iou")),
            "" if before is None else f"before training {v.decimal(before)}",
        ),
        ("Questions that fell back to all tokens", v.percent(v.share(results, "fallback_rate")), ""),
        ("Boxes that parsed", v.percent(v.share(results, "parse_rate")), ""),
    )
    return Sheet("Main figures", ("Figure", "Value", "Detail"), rows)


def control_sheet(results: Mapping[str, Any]) -> Sheet:
    """Accuracy of every control, and by how much the sparse branch is better. Controls that did not run are left out;
    those that are usual and missing stand there with a dash."""
    shown = [c for c in v.CONTROLS if c != "rl_dense" or v.accuracy(results, c) is not None]
    rows = []
    for control in shown:
        gap = v.difference(results, "sparse", control)
        rows.append((v.label(control), v.percent(v.accuracy(results, control)), _difference(gap)))
    note = "Random, centre, inverted and oracle choose tokens at the budget of the sparse branch."
    return Sheet("Controls", ("Control", "Accuracy", "Sparse minus control"), tuple(rows), note)


def comparison_sheet(results: Mapping[str, Any]) -> Sheet | None:
    """Listed comparisons that the other sheets do not show, or None."""
    shown = [{"sparse", c} for c in v.CONTROLS] + [{c, "base_dense"} for c in ("localization", "sparse")]
    rows = []
    for row in results.get("comparisons") or ():
        a, b = v.condition_name(row["a"]), v.condition_name(row["b"])
        if {a, b} not in shown:
            rows.append((f"{v.label(a)} minus {_lower(v.label(b))}", _difference(v.difference(results, a, b))))
    return Sheet("Other comparisons", ("Comparison", "Difference"), tuple(rows)) if rows else None


def template_sheet(results: Mapping[str, Any]) -> Sheet | None:
    """One row for each question template, or None."""
    conditions = ("base_dense", "localization", "sparse", "untrained_sparse", "random", "oracle")
    heads = ("Base", "Localization", "Sparse", "Untrained sparse", "Random", "Oracle")
    rows = []
    for template, row in (results.get("by_template") or {}).items():
        figures = (v.percent(v.share(row, c)) for c in conditions)
        count, iou, kept = (v.number(row, "num_questions"), v.share(row, "mean_iou"), v.share(row, "kept_ratio"))
        rows.append((template, v.decimal(count, 0), *figures, v.decimal(iou), v.percent(kept)))
    columns = ("Template", "Questions", *heads, "IoU", "Kept")
    return Sheet("By question template", columns, tuple(rows)) if rows else None


def budget_sheet(results: Mapping[str, Any]) -> Sheet | None:
    """Accuracy of each way of choosing tokens at each budget, largest first, or None."""
    conditions = ("sparse", *v.SAME_BUDGET)
    heads = ("Sparse", "Random", "Centre", "Inverted", "Oracle")
    budgets = results.get("budgets") or {}
    rows = [
        (v.percent(float(budget)), v.percent(v.share(row, "kept_ratio")), *(v.percent(v.share(row, c)) for c in conditions))
        for budget, row in sorted(budgets.items(), key=lambda item: -float(item[0]))
    ]
    return Sheet("Token budgets", ("Budget", "Kept", *heads), tuple(rows)) if rows else None


def stage_sheet(results: Mapping[str, Any]) -> Sheet | None:
    """Seconds of every stage, the sum of both passes and one dense pass, or None."""
    times = results.get("seconds_by_stage") or {}
    total = v.number(times, "total")
    rows = []
    for key, name in STAGES.items():
        value = v.number(times, key)
        part = v.percent(value / total) if value is not None and total else v.DASH
        rows.append((name, v.seconds(value), part))
    if all(row[1] == v.DASH for row in rows):
        return None
    note = "The dense pass is the base line in the same engine; its share is its time relative to both passes."
    return Sheet("Time by stage", ("Stage", "Time", "Share of both passes"), tuple(rows), note)


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """All tables for which `results` holds figures, in the order of reading."""
    optional = (comparison_sheet, template_sheet, budget_sheet, stage_sheet)
    found = (make(results) for make in optional)
    return [main_sheet(results), control_sheet(results), *(sheet for sheet in found if sheet is not None)]


# --- how it is shown ------------------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any]) -> Table:
    """Main figures first, controls below: what an evaluation prints at its end.

    Args:
        results: the content of `results.json`; null figures print as a dash.
    """
    main, controls = main_sheet(results), control_sheet(results)
    table = Table(title=Text(headline(results)), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(main.columns[0])
    table.add_column(main.columns[1], justify="right")
    table.add_column(main.columns[2], style="dim")
    for row in main.rows:
        style = "bold" if row[0].startswith(("Relative", v.LABELS["sparse"])) else ""
        table.add_row(*map(Text, row), style=style)
    table.add_section()
    table.add_row(*map(Text, controls.columns), style="bold dim")
    for row in controls.rows:
        table.add_row(*map(Text, row))
    return table


def results_markdown(results: Mapping[str, Any]) -> str:
    """Every table of `sheets` as Markdown, one below the other."""
    return "\n\n".join(sheet.markdown() for sheet in sheets(results)) + "\n"


def headline(results: Mapping[str, Any]) -> str:
    """`name · dataset · n questions · seed s`, without what is unknown."""
    count, seed = results.get("num_questions"), results.get("seed")
    parts: Sequence[object] = (
        results.get("name"),
        results.get("dataset"),
        None if count is None else f"{count:,} questions",
        None if seed is None else f"seed {seed}",
    )
    return " · ".join(str(part) for part in parts if part not in (None, "")) or "Evaluation"


def _accuracy_row(results: Mapping[str, Any], condition: str) -> tuple[str, str, str]:
    gap = v.difference(results, condition, "base_dense")
    detail = f"{_difference(gap)} against base" if gap else ""
    return v.label(condition), v.percent(v.accuracy(results, condition)), detail


def _difference(gap: v.Difference | None) -> str:
    """`+5.1 points (+2.0 to +8.3, p = 0.002)`, as far as known."""
    if gap is None:
        return v.DASH
    extra = [v.points_interval(gap.interval)] if gap.interval else []
    extra += [v.p_value(gap.p_value)] if gap.p_value is not None else []
    return f"{v.points(gap.estimate)} points" + (f" ({', '.join(extra)})" if extra else "")


def _lower(text: str) -> str:
    """The label within a sentence; `RL …` stays as it is."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _cell(text: str) -> str:
    """Text that cannot leave its table cell, nor be read as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
