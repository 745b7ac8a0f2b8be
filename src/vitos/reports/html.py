"""The report of an evaluation: an overview, its figures, and all of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vitos.core.numbering import image_numbers
from vitos.core.record import IMAGE_PLACEHOLDER, parse_options
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports import table
from vitos.reports.cases import MAX_SIDE, boxes_of, field, grid_of, named, pack_cases, spelled
from vitos.reports.curves import pareto, training_curves
from vitos.reports.overlay import as_mask
from vitos.reports.overview import accuracy_figure, big_numbers
from vitos.reports.page import Overview, Picture, Section, write_page
from vitos.reports.sheet import draw_sheet
from vitos.reports.summary import summary

_ORIGIN = (("Checkpoint", "checkpoint"), ("Base model", "base"), ("vitos", "vitos_version"), ("Command", "command"))


def write_report(
    run_dir: Path,
    results: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]] = (),
    out: Path | None = None,
) -> None:
    """Write the report, whole or not at all.

    Args:
        run_dir: folder of `cases.jsonl`; relative image paths start there.
        results: content of `results.json`.
        cases: rows of `cases.jsonl`, in the order of the test set.
        metrics: rows of `metrics.jsonl`; empty for an evaluation without a training run.
        out: the file to write, by default `run_dir / "report.html"`.

    Raises:
        ResultsError: if a field does not hold what the schema says; the message names it and the case.
        ImageError: if the image of a case is missing or broken.
    """
    out = out or run_dir / "report.html"
    sections = (
        Section(sheet=table.main_sheet(results), text_last=True, anchor="figures"),
        Section(sheet=table.open_sheet(results)),
        Section(sheet=table.text_sheet(results), level=3),
        Section(sheet=table.control_sheet(results), text_last=True, anchor="controls"),
        Section(sheet=table.comparison_sheet(results), text_last=True, level=3),
        Section(sheet=table.dataset_sheet(results), anchor="data-sets"),
        Section(sheet=table.template_sheet(results), anchor="templates"),
        Section(
            sheet=table.budget_sheet(results),
            figure=pareto(results) if results.get("budgets") else None,
            narrow=pareto(results, size=(3.5, 4)) if results.get("budgets") else None,
            alt="Accuracy over the share of visual tokens kept; the figures are in the table below.",
            anchor="budgets",
        ),
        Section(sheet=table.stage_sheet(results), anchor="times"),
        Section(
            title="Training",
            note="Dots are single steps, lines a centred running mean; a dashed vertical line is a change of stage.",
            figure=training_curves(metrics) if metrics else None,
            narrow=training_curves(metrics, columns=1) if metrics else None,
            alt="Curves of the training run: rewards, accuracies, boxes and rates over the steps.",
            anchor="training",
        ),
    )
    write_page(
        out,
        table.headline(results),
        sections,
        summary=summary(results),
        overview=_overview(results, cases, run_dir),
        cases=pack_cases(cases, run_dir, out) if cases else None,
        origin=[(name, results[key]) for name, key in _ORIGIN if results.get(key)],
    )


def _overview(results: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], run_dir: Path) -> Overview:
    wide, narrow = accuracy_figure(results), accuracy_figure(results, size=(3.5, 3.9))
    chosen = next((case for case in cases if (field(case, "conditions").get("sparse") or {}).get("correct")), None)
    return Overview(
        numbers=big_numbers(results),
        figures=(wide, narrow) if wide and narrow else (),
        picture=_picture(chosen, run_dir) if chosen else None,
    )


def _picture(case: Mapping[str, Any], run_dir: Path) -> Picture:
    """The images of a case with their boxes and kept tokens."""
    conditions = field(case, "conditions")
    located, sparse = conditions.get("localization") or {}, conditions["sparse"]
    images = [load_image(without_crop(run_dir / field(one, "image"))) for one in (case, *case.get("others", ()))]
    for image in images:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    grid = grid_of(case)
    boxes = boxes_of(case, located.get("boxes"), "conditions.localization.boxes")
    gold = boxes_of(case, case.get("gold_boxes"), "gold_boxes")
    asked = str(field(case, "question"))
    with named(case, "condition 'sparse'"):
        mask = as_mask(sparse["kept"], grid.num_tokens) if grid and "kept" in sparse else None
        drawn = draw_sheet(images, grid, mask, boxes, gold, image_numbers(asked))
    question = asked.replace(IMAGE_PLACEHOLDER, "").strip()
    kept = (
        f"{len(sparse['kept'])} of {grid.num_tokens} visual tokens kept" if grid and "kept" in sparse else "all tokens"
    )
    return Picture(
        image=drawn,
        alt=f"Image of case {case['id']}: {kept}, {len(boxes)} predicted and {len(gold)} gold boxes.",
        question=question.splitlines()[0],
        answer=spelled(sparse.get("answer"), parse_options(question)),
        detail=kept,
    )
