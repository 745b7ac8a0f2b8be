"""The report of a bench: the same figures in every file, and names that cannot harm who opens them."""

import csv
import json

import pytest
from tests.reports.page import Page

from vitos.reports.bench import BenchNames, bench_pareto, bench_sheets, write_bench

NAMES = BenchNames(
    selectors={"policy": "Own boxes", "random": "Random"},
    ablations={"blank": "Blank image"},
    dense="dense",
    own="own",
    average="all",
)


def row(condition, accuracy, kept=1.0, benchmark="set", model="nano"):
    selector, _, budget = condition.partition("@")
    gap = {"num_questions": 60, "difference": accuracy - 0.65, "ci": [-0.2, 0.1], "p_value": 0.25}
    return {
        "model": model, "benchmark": benchmark, "condition": condition, "selector": selector, "budget": budget or "1",
        "num_questions": 60, "accuracy": accuracy, "accuracy_ci": [0.4, 0.8], "no_answer_rate": 0.0,
        "token_f1": None, "kept_ratio": kept, "fallback_rate": None, "iou": None, "relative": accuracy / 0.65,
        "relative_ci": None, "vs_dense": None if condition == "dense" else gap, "vs_random": None,
    }  # fmt: skip


@pytest.fixture
def bench():
    conditions = {"dense": (0.65, 1.0), "policy@own": (0.8, 0.1), "policy@0.5": (0.7, 0.5), "random@0.25": (0.4, 0.25),
                  "random@0.5": (0.6, 0.5), "blank": (0.3, 1.0)}  # fmt: skip
    rows = [row(condition, *figures) for condition, figures in conditions.items()]
    group = {"model": "nano", "benchmark": "set", "by": "question_type", "num_questions": 30}
    return {
        "vitos_version": "0.1.0",
        "settings": {"protocol": "all"},
        "models": {"nano": {}},
        "benchmarks": {"set": {"questions": 60, "outside_protocol": 1, "left_out": 2}},
        "rows": rows,
        "groups": [
            {**group, "value": "yes/no", "condition": "dense", "accuracy": 0.5},
            {**group, "value": "yes/no", "condition": "random@0.5", "accuracy": 0.25},
            {**group, "value": "", "condition": "dense", "accuracy": 0.75},
        ],
        "seconds": [
            {"model": "nano", "benchmark": "set", "wall": 12.0, "model_share": 0.5,
             "per_question": {"localize": {"prefill": 0.01}, "random@0.5": {"prefill": 0.02, "decode": 1.5}}},
        ],
    }  # fmt: skip


def test_every_table_is_in_the_page_and_in_markdown(bench, tmp_path):
    write_bench(tmp_path, bench, NAMES)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    markdown = (tmp_path / "tables.md").read_text(encoding="utf-8")
    sheets = bench_sheets(bench, NAMES)
    assert [sheet.title for sheet in sheets] == [
        "Benchmarks", "nano · set", "Does it look? nano · set", "nano · set by question type",
        "Time per question · nano · set",
    ]  # fmt: skip
    for sheet in sheets:
        assert f"### {sheet.title}\n" in markdown
        for cells in (sheet.columns, *sheet.rows):
            assert "| " + " | ".join(cells) + " |" in markdown
            assert " ".join(" ".join(cells).split()) in page.words
        assert sheet.note in page.words
    assert "For research only." in page.words
    (plot,) = page.all("img")
    assert plot["src"].startswith("data:image/svg+xml;base64,")
    assert "Accuracy of nano" in plot["alt"]


def test_cells_are_written_with_their_intervals(bench):
    _, accuracies, ablations, groups, times = bench_sheets(bench, NAMES)
    assert accuracies.rows[1][:5] == ("Own boxes, own budget", "60", "80.0% (40.0% to 80.0%)", "123.1%", "10.0%")
    assert accuracies.rows[1][8] == "+15.0 (−20.0 to +10.0, p = 0.250)"
    assert "Blank image" not in [cells[0] for cells in accuracies.rows]
    assert ablations.columns == ("", "All tokens", "Blank image", "Own boxes")
    assert groups.rows == (("yes/no", "30", "50.0%", "25.0%"), ("(none)", "30", "75.0%", "–"))
    assert times.rows == (
        ("Localization", "–", "–", "–", "10 ms", "–", "10 ms"),
        ("Random, 50%", "–", "–", "–", "20 ms", "1.5 s", "1.52 s"),
    )


def test_the_figure_shows_each_selector_at_its_budgets(bench):
    lines = {line.get_label(): line.get_xydata().tolist() for line in bench_pareto(bench, "nano", NAMES).axes[0].lines}
    assert lines["Own boxes"] == [[0.5, 0.7]]
    assert lines["Random"] == [[0.25, 0.4], [0.5, 0.6]]
    assert lines["Own boxes, own budget (10.0%)"] == [[0.1, 0.8]]
    assert lines["All tokens"][0][1] == 0.65
    bench["rows"] = bench["rows"][:2]
    assert bench_pareto(bench, "nano", NAMES) is None
    assert bench_pareto(bench, "another", NAMES) is None


def test_the_average_comes_first_and_names_itself(bench):
    bench["rows"] += [row("dense", 0.5, benchmark="all"), row("random@0.5", 0.45, 0.5, benchmark="all")]
    assert bench_sheets(bench, NAMES)[1].title == "nano · average of all benchmarks"
    assert bench_pareto(bench, "nano", NAMES).axes[0].get_title(loc="left") == "nano: average of all benchmarks"


def test_untrusted_names_are_shown_not_run(bench, tmp_path):
    attack = "=<script>alert(1)</script>"
    bench["models"] = {attack: {}}
    for part in ("rows", "groups", "seconds"):
        bench[part] = [{**entry, "model": attack} for entry in bench[part]]
    write_bench(tmp_path, bench, NAMES)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert attack in page.words
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {cells["model"] for cells in rows} == {f"'{attack}"}  # no formula to a spreadsheet
    assert rows[1]["vs_dense.ci.low"] == "-0.2"
    assert rows[0]["vs_dense.difference"] == ""
    assert json.loads((tmp_path / "results.json").read_text())["models"] == {attack: {}}
