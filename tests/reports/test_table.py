"""The tables of an evaluation: their figures, and what is left out."""

import io

import pytest
from rich.console import Console

from vitos.reports.table import (
    budget_sheet,
    comparison_sheet,
    control_sheet,
    dataset_sheet,
    main_sheet,
    results_markdown,
    results_table,
    stage_sheet,
    template_sheet,
)


def as_rows(sheet):
    return {row[0]: row[1:] for row in sheet.rows}


def printed(results):
    console = Console(file=io.StringIO(), width=140)
    console.print(results_table(results))
    return console.file.getvalue()


def test_main_figures(results):
    rows = as_rows(main_sheet(results))
    assert rows["Base model, all tokens"] == ("61.2%", "")
    assert rows["Sparse branch, kept tokens"] == ("68.3%", "+7.1 points against base")
    assert rows["Relative performance (sparse ÷ base)"] == ("111.6%", "95% interval 105.0% to 118.0%")
    assert rows["Visual tokens kept"] == ("24.1%", "p10 9.0%, p90 44.0%")
    assert rows["Mean IoU of the boxes"] == ("0.55", "before training 0.31")
    assert "Sparse answers that could not be read" not in rows
    assert (
        as_rows(main_sheet({**results, "no_answer_rate": 0.02}))["Sparse answers that could not be read"][0] == "2.0%"
    )


def test_controls_are_measured_against_the_sparse_branch(results):
    rows = as_rows(control_sheet(results))
    assert rows["Random tokens"] == ("42.0%", "+26.3 points (+22.0 to +31.0, p < 0.001)")
    assert rows["Oracle (gold) boxes"] == ("70.0%", "−1.7 points (−4.0 to +1.0, p = 0.210)")
    assert rows["Centre tokens"] == ("45.0%", "+23.3 points")


def test_optional_controls_show_once_they_ran(results):
    assert "RL without pruning, all tokens" not in as_rows(control_sheet(results))
    ran = as_rows(control_sheet({**results, "control_rl_dense_accuracy": 0.66, "dense_accuracy": 0.69}))
    assert ran["RL without pruning, all tokens"] == ("66.0%", "+2.3 points")
    assert ran["Trained model, all tokens"] == ("69.0%", "−0.7 points")


def test_a_comparison_on_part_of_the_questions_says_so(results):
    results["comparisons"][0]["num_questions"] = 410
    results["comparisons"][1]["num_questions"] = 600
    rows = as_rows(control_sheet(results))
    assert rows["Random tokens"][1].endswith("410 questions)")
    assert "questions" not in rows["Oracle (gold) boxes"][1]


def test_other_comparisons_are_not_lost(results):
    assert comparison_sheet(results).rows == ()
    row = {"a": "localization", "b": "random", "difference": 0.2, "ci": None, "p_value": None}
    sheet = comparison_sheet({**results, "comparisons": [*results["comparisons"], row]})
    assert sheet.rows == (("Localization branch, all tokens", "Random tokens", "+20.0 points"),)


def test_columns_without_a_figure_are_left_out(results):
    sheet = template_sheet(results)
    assert sheet.columns == ("Template", "Questions", "Base", "Sparse", "Kept")
    assert sheet.rows == (("how_many", "120", "50.0%", "60.0%", "20.0%"),)


def test_data_sets_are_listed_where_there_are_several(results):
    row = {"num_questions": 10, "sparse": 0.5}
    assert dataset_sheet({**results, "by_dataset": {"a": row}}).rows == ()
    assert [r[0] for r in dataset_sheet({**results, "by_dataset": {"a": row, "b": row}}).rows] == ["a", "b"]


def test_budgets_from_large_to_small(results):
    sheet = budget_sheet(results)
    assert sheet.columns == ("Budget", "Kept", "Own boxes", "Random", "Oracle")
    assert sheet.rows == (
        ("50.0%", "50.0%", "65.0%", "45.0%", "70.0%"),
        ("10.0%", "10.0%", "50.0%", "30.0%", "60.0%"),
    )


def test_stage_times_and_their_share(results):
    rows = as_rows(stage_sheet(results))
    assert rows["Vision encoder"] == ("0.5 s", "24.9%")
    assert rows["Sparsify"] == ("10 ms", "0.5%")
    assert rows["Reason: decode"] == ("–", "–")
    assert rows["One dense pass"] == ("1 s", "49.8%")
    assert stage_sheet({**results, "seconds_by_stage": {"total": None}}).rows == ()


def test_an_evidence_head_has_rows_of_its_own(results):
    gap = {"difference": 0.021, "ci": [-0.01, 0.05], "p_value": 0.2, "num_questions": 600}
    results["evidence_head"] = {"accuracy": 0.633, "kept_ratio": 0.25, "minus_base_dense": gap}
    row = as_rows(main_sheet(results))["Evidence head, its plan"]
    assert row == ("63.3%", "25.0% of the tokens, +2.1 points (−1.0 to +5.0, p = 0.200) against base")
    assert "One pass with the evidence head" not in as_rows(stage_sheet(results))
    results["seconds_by_stage"] |= {"early_prefill": 0.2, "evidence_head_total": 0.6}
    rows = as_rows(stage_sheet(results))
    assert rows["First layers: prefill"] == ("0.2 s", "10.0%")
    assert rows["One pass with the evidence head"] == ("0.6 s", "29.9%")
    assert "Evidence head, its plan" in printed(results)
    assert "Evidence head" in results_markdown(results)


@pytest.mark.parametrize("empty", [{}, "nulls"])
def test_unknown_figures_print_as_dashes(results, empty):
    known = dict.fromkeys(results) if empty == "nulls" else {}
    assert {row[1] for row in main_sheet(known).rows} == {"–"}
    assert {row[1:] for row in control_sheet(known).rows} == {("–", "–")}
    text = printed(known)
    assert "None" not in text
    assert "Evaluation" in text
    assert "None" not in results_markdown(known)


def test_printed_table_has_main_figures_first_and_controls_below(results):
    text = printed(results)
    assert "quickstart · phantom/test · 600 questions · seed 3" in text
    assert (
        text.index("Relative performance") < text.index("111.6%") < text.index("Random tokens") < text.index("42.0%")
    )


def test_printed_table_does_not_read_markup_in_names(results):
    assert "[red]x[/red]" in printed({**results, "dataset": "[red]x[/red]"})


def test_markdown_tables_are_rectangular_and_escaped(results):
    results["by_template"]["a|b\n<script>"] = {"num_questions": 1}
    text = results_markdown(results)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for lines in tables:
        bars = [line.replace("\\|", "").count("|") for line in lines]
        assert len(set(bars)) == 1
    assert "a\\|b &lt;script>" in text
    assert "p < 0.001" in text
