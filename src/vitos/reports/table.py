"""Tables of an evaluation: described once as `Sheet`s, printed by rich, as Markdown, and in the HTML report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from vitos.reports import values as v

STAGES = {
    "vision": "Vision encoder",
    "prefix": "Shared prefix: prefill",
    "early_prefill": "First layers: prefill",
    "localize_prefill": "Localize: prefill",
    "localize_decode": "Localize: decode",
    "sparsify": "Sparsify",
    "reason_prefill": "Reason: prefill",
    "reason_decode": "Reason: decode",
    "total": "Both passes",
    "dense_total": "One dense pass",
    "evidence_head_total": "One pass with the evidence head",
}
OPTIONAL = ("prefix", "early_prefill", "evidence_head_total")
"""Stages of some plans only; left out where they are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A table as text: the first column names the row, the others hold its figures.

    Attributes:
        columns: one heading per column.
        rows: one cell per column in each row; a sheet without rows is not shown.
        note: a sentence for below the table, or empty.

    >>> sheet = Sheet(title="Boxes", columns=("Set", "IoU"), rows=(("val", "0.56"),))
    >>> print(sheet.markdown())
    ### Boxes
    <BLANKLINE>
    | Set | IoU |
    | :-- | --: |
    | val | 0.56 |
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """A heading and a pipe table, its figures aligned to the right."""
        head = [self.columns, (":--", *["--:"] * (len(self.columns) - 1))]
        lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (*head, *self.rows)]
        return "\n".join([f"### {_cell(self.title)}", "", *lines, *(("", self.note) if self.note else ())])


# --- what is shown --------------------------------------------------------------------------------------------------


def main_sheet(results: Mapping[str, Any]) -> Sheet:
    """Accuracies, relative performance, tokens kept and the quality of the boxes."""
    kept = [v.percent(v.share(results, f"kept_ratio_{p}")) for p in ("p10", "p90")]
    ci = v.interval(results, "relative_performance_ci")
    before, unread = v.share(results, "mean_iou_before"), v.share(results, "no_answer_rate")
    rows = (
        (v.label("base_dense"), v.percent(v.accuracy(results, "base_dense")), ""),
        _accuracy_row(results, "localization"),
        _accuracy_row(results, "sparse"),
        *_head_row(results),
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
        ("Box lists that parsed", v.percent(v.share(results, "parse_rate")), ""),
        *((("Sparse answers that could not be read", v.percent(unread), ""),) if unread is not None else ()),
    )
    return Sheet(title="Main figures", columns=("Figure", "Value", "Detail"), rows=rows)


def control_sheet(results: Mapping[str, Any]) -> Sheet:
    """Accuracy of each control, and by how much the sparse branch is better.

    Controls that every evaluation has show a dash where they are missing; the others are left out.
    """
    rows = []
    for control in (*v.CONTROLS, "dense"):
        value = v.accuracy(results, control)
        if value is not None or control not in ("shifted", "rl_dense", "text_only", "dense"):
            gap = v.difference(results, "sparse", control)
            rows.append((v.label(control), v.percent(value), _difference(gap, results.get("num_questions"))))
    note = (
        "Random, shifted, centre and inverted see as many tokens as the sparse branch did on the same question "
        "(inverted fewer where the boxes cover most of the image); oracle sees the tokens of the gold boxes."
    )
    columns = ("Control", "Accuracy", "Sparse minus control")
    return Sheet(title="Controls", columns=columns, rows=tuple(rows), note=note)


def open_sheet(results: Mapping[str, Any]) -> Sheet:
    """Answers in words: the rule's score by condition, the judge's next to it, and their agreement."""
    found = results.get("open") or {}
    rows = [
        (
            v.label(name),
            v.decimal(v.number(row, "num_questions"), 0),
            _score(row, "score"),
            v.percent(v.share(row, "exact")),
            _score(row, "judge"),
            v.percent(v.share(row, "agreement")),
            v.decimal(v.number(row, "kappa")),
        )
        for name, row in (found.get("conditions") or {}).items()
    ]
    columns = ("Tokens", "Questions", "Score", "Exactly right", "Judge", "Agreement", "Kappa")
    return dataclasses.replace(_without_empty("Answers in words", columns, rows), note=_open_note(results))


def _score(row: Mapping[str, Any], key: str) -> str:
    """`0.45 (0.41 to 0.49)`."""
    ci = v.interval(row, f"{key}_ci")
    return v.decimal(v.share(row, key)) + (f" ({v.decimal(ci.low)} to {v.decimal(ci.high)})" if ci else "")


def _open_note(results: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in ((results.get("open") or {}).get("kinds") or {}).items())
    note = (
        f"Kinds of answers: {kinds}. Score: the rule's, 0 to 1, as in training: token F1 for texts, F1 of the "
        "findings for lists, 1 or 0 for words and numbers. The blank image shows how far the questions' words lead."
    )
    judge = results.get("judge")
    if not judge:
        return note
    missing = sum((judge.get("unavailable") or {}).values())
    return (
        f"{note} Judge: the grade of {judge.get('model')}, 0 to 1; {missing} grades could not be had and are left "
        "out. Agreement and kappa (Cohen's) compare right and wrong by the rule with a grade above 0.5."
    )


def text_sheet(results: Mapping[str, Any]) -> Sheet:
    """Measures of report text (BLEU, ROUGE, plug-ins) by condition."""
    conditions = (results.get("open") or {}).get("conditions") or {}
    rows = {name: row.get("metrics") or {} for name, row in conditions.items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [
        (v.label(name), *(v.decimal(v.number(row, key), 3) for key in names)) for name, row in rows.items() if row
    ]
    return Sheet(title="Measures of the answers' texts", columns=("Tokens", *names), rows=tuple(cells))


def comparison_sheet(results: Mapping[str, Any]) -> Sheet:
    """Listed comparisons that the other sheets do not show."""
    shown = [{"sparse", c} for c in (*v.CONTROLS, "dense")] + [{c, "base_dense"} for c in ("localization", "sparse")]
    rows = []
    for row in results.get("comparisons") or ():
        a, b = v.condition_name(row["a"]), v.condition_name(row["b"])
        if {a, b} not in shown:
            gap = _difference(v.difference(results, a, b), results.get("num_questions"))
            rows.append((v.label(a), v.label(b), gap))
    return Sheet(title="Other comparisons", columns=("Condition", "Minus", "Difference"), rows=tuple(rows))


def template_sheet(results: Mapping[str, Any]) -> Sheet:
    """One row per question template."""
    return _group_sheet("By question template", "Template", results.get("by_template") or {})


def dataset_sheet(results: Mapping[str, Any]) -> Sheet:
    """One row per data set, where there are several."""
    groups = results.get("by_dataset") or {}
    return _group_sheet("By data set", "Data set", groups if len(groups) > 1 else {})


def budget_sheet(results: Mapping[str, Any]) -> Sheet:
    """Accuracy of each way of choosing tokens at each budget, largest first."""
    heads = {"sparse": "Own boxes", "random": "Random", "centre": "Centre", "inverted": "Inverted", "oracle": "Oracle"}
    rows = []
    for budget, row in sorted((results.get("budgets") or {}).items(), key=lambda item: -float(item[0])):
        figures = (v.percent(v.share(row, key)) for key in ("kept_ratio", *heads))
        rows.append((v.percent(float(budget)), *figures))
    note = "Each has exactly the budget. Inverted is left out where fewer tokens than that lie outside the boxes."
    return _without_empty("Token budgets", ("Budget", "Kept", *heads.values()), rows, note)


def stage_sheet(results: Mapping[str, Any]) -> Sheet:
    """Seconds per question in each stage, their sum over both passes, and one dense pass; no rows if none is known."""
    times = {key: v.number(results.get("seconds_by_stage") or {}, key) for key in STAGES}
    total = times["total"]
    rows = [
        (STAGES[key], v.seconds(value), v.percent(value / total) if value is not None and total else v.DASH)
        for key, value in times.items()
        if value is not None or key not in OPTIONAL
    ]
    note = "The dense pass is the base model on all tokens, once, in the same engine: the base line of any speed-up."
    return Sheet(
        title="Time per question",
        columns=("Stage", "Time", "Share of both passes"),
        rows=tuple(rows) if set(times.values()) != {None} else (),
        note=note,
    )


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """All tables for which `results` holds figures, in the order of reading."""
    makers = (
        main_sheet, open_sheet, text_sheet, control_sheet, comparison_sheet, dataset_sheet, template_sheet,
        budget_sheet, stage_sheet,
    )  # fmt: skip
    return [sheet for make in makers if (sheet := make(results)).rows]


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
    opened = [(name, score, f"{exact} exactly right") for name, _, score, exact, *_ in open_sheet(results).rows]
    parts = [(controls.columns, controls.rows), (("Answers in words", "Score", ""), opened)]
    for columns, rows in parts if opened else parts[:1]:
        table.add_section()
        table.add_row(*map(Text, columns), style="bold dim")
        for row in rows:
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
    detail = f"{_difference(gap, results.get('num_questions'))} against base" if gap else ""
    return v.label(condition), v.percent(v.accuracy(results, condition)), detail


def _head_row(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A row for the recipe's evidence head, where it has one."""
    found = results.get("evidence_head")
    if not found:
        return []
    parts = [f"{v.percent(v.share(found, 'kept_ratio'))} of the tokens"]
    if gap := v.listed_difference(found.get("minus_base_dense") or {}):
        parts.append(f"{_difference(gap, results.get('num_questions'))} against base")
    return [(v.label("evidence_head"), v.percent(v.share(found, "accuracy")), ", ".join(parts))]


def _group_sheet(title: str, head: str, groups: Mapping[str, Mapping[str, Any]]) -> Sheet:
    conditions = {
        "base_dense": "Base",
        "localization": "Localization",
        "sparse": "Sparse",
        "dense": "Trained, all tokens",
        "untrained_sparse": "Untrained sparse",
        "random": "Random",
        "shifted": "Shifted",
        "oracle": "Oracle",
    }
    rows = []
    for name, row in groups.items():
        figures = (v.percent(v.share(row, condition)) for condition in conditions)
        count, iou, kept = v.number(row, "num_questions"), v.share(row, "mean_iou"), v.share(row, "kept_ratio")
        rows.append((name, v.decimal(count, 0), *figures, v.decimal(iou), v.percent(kept)))
    return _without_empty(title, (head, "Questions", *conditions.values(), "IoU", "Kept"), rows)


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], note: str = "") -> Sheet:
    """A sheet without the columns that hold nothing but dashes."""
    keep = [i for i in range(len(columns)) if any(row[i] != v.DASH for row in rows)]
    kept = (tuple(row[i] for i in keep) for row in (columns, *rows))
    return Sheet(title=title, columns=next(kept), rows=tuple(kept), note=note)


def _difference(gap: v.Difference | None, num_questions: int | None = None) -> str:
    """`+5.1 points (+2.0 to +8.3, p = 0.002)`, as far as known; the questions too if not all of `num_questions`."""
    if gap is None:
        return v.DASH
    extra = [v.points_interval(gap.interval)] if gap.interval else []
    extra += [v.p_value(gap.p_value)] if gap.p_value is not None else []
    extra += [f"{gap.num_questions} questions"] if gap.num_questions and gap.num_questions != num_questions else []
    return f"{v.points(gap.estimate)} points" + (f" ({', '.join(extra)})" if extra else "")


def _cell(text: str) -> str:
    """Markdown that cannot leave its table cell."""
    return v.markdown_line(text).replace("|", "\\|")
