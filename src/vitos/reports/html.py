"""The report of an evaluation: its figures, and some of its answers under their images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View
from vitos.core.numbering import image_numbers
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports import table
from vitos.reports import values as v
from vitos.reports.curves import pareto, training_curves
from vitos.reports.overlay import GOLD_COLOUR, PREDICTED_COLOUR, as_mask
from vitos.reports.page import Section, image_uri, write_page
from vitos.reports.sheet import draw_sheet
from vitos.reports.summary import summary

MAX_CASES = 24
MAX_SIDE = 640
MAX_CHARACTERS = 1200
# Conditions whose text is shown under a case, in this order.
SHOWN_CONDITIONS = ("localization", "sparse", "random")

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
        ImageError: if the image of a shown case is missing or broken.
    """
    right, wrong = select_cases(cases)
    sections = (
        Section(sheet=table.main_sheet(results), text_last=True),
        Section(sheet=table.control_sheet(results), text_last=True),
        Section(sheet=table.comparison_sheet(results), text_last=True, level=3),
        Section(sheet=table.dataset_sheet(results)),
        Section(sheet=table.template_sheet(results)),
        Section(
            sheet=table.budget_sheet(results),
            figure=pareto(results) if results.get("budgets") else None,
            alt="Accuracy over the share of visual tokens kept; the figures are in the table below.",
        ),
        Section(sheet=table.stage_sheet(results)),
        Section(
            title="Training",
            note="Dots are single steps, lines a centred running mean; a dashed vertical line is a change of stage.",
            figure=training_curves(metrics) if metrics else None,
            alt="Curves of the training run: rewards, accuracies, boxes and rates over the steps.",
            scaled=False,
        ),
    )
    write_page(
        out or run_dir / "report.html",
        table.headline(results),
        sections,
        summary=summary(results),
        cases={
            "groups": [
                ("Answered rightly", [_view(case, run_dir) for case in right]),
                ("Answered wrongly", [_view(case, run_dir) for case in wrong]),
            ],
            "total": len(cases),
            "per_group": MAX_CASES // 2,
            "predicted_colour": "#" + bytes(PREDICTED_COLOUR).hex(),
            "gold_colour": "#" + bytes(GOLD_COLOUR).hex(),
        },
        origin=[(name, results[key]) for name, key in _ORIGIN if results.get(key)],
    )


def select_cases(
    cases: Sequence[Mapping[str, Any]], per_group: int = MAX_CASES // 2
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The first cases that the sparse branch got right, and those that it got wrong, in the order of the test set.

    The templates take turns, in the order of their first case, until `per_group` cases are chosen or none is left.
    Nothing else about a case matters, so the choice cannot flatter. Cases without a sparse verdict are left out.
    """
    return _spread(cases, True, per_group), _spread(cases, False, per_group)


def _spread(cases: Sequence[Mapping[str, Any]], correct: bool, count: int) -> list[Mapping[str, Any]]:
    queues: dict[object, list[int]] = {}
    for index, case in enumerate(cases):
        if (_field(case, "conditions").get("sparse") or {}).get("correct") is correct:
            queues.setdefault(case.get("template"), []).append(index)
    turns = sorted(turn for queue in queues.values() for turn in enumerate(queue))
    return [cases[index] for index in sorted(index for _, index in turns[:count])]


# --- one case -------------------------------------------------------------------------------------------------------


def _view(case: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A case as the template shows it; `image` is a data URI."""
    conditions = _field(case, "conditions")
    located, sparse = conditions.get("localization") or {}, conditions.get("sparse") or {}
    images = []
    for one in (case, *case.get("others", ())):
        images.append(load_image(without_crop(run_dir / _field(one, "image"))))
        images[-1].thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    grid = _grid(case)
    kept = sparse.get("kept") if grid else None
    boxes = _boxes(case, located.get("boxes"), "conditions.localization.boxes")
    gold = _boxes(case, case.get("gold_boxes"), "gold_boxes")
    with _named(case, "condition 'sparse'"):
        mask = None if kept is None or grid is None else as_mask(kept, grid.num_tokens)
        picture = draw_sheet(images, grid, mask, boxes, gold, image_numbers(str(_field(case, "question"))))
    kept_text = f"{len(kept)} of {grid.num_tokens} visual tokens kept" if kept is not None and grid else "all tokens"
    shown = [name for name in SHOWN_CONDITIONS if conditions.get(name) is not None]
    return {
        "id": _field(case, "id"),
        "template": case.get("template"),
        "image": image_uri(picture),
        "width": picture.width,
        "height": picture.height,
        "alt": f"Image of case {case.get('id')}: {kept_text}, {len(boxes)} predicted and {len(gold)} gold boxes.",
        "question": _shortened(str(_field(case, "question")).replace(IMAGE_PLACEHOLDER, "").strip()),
        "gold": case.get("gold") or v.DASH,
        "answers": [_answer(name, conditions[name], kept_text) for name in shown],
    }


def _answer(name: str, condition: Mapping[str, Any], kept_text: str) -> dict[str, str]:
    """What one condition wrote, for the template."""
    letter, detail = condition.get("answer"), ""
    if name == "localization":
        iou = v.share(condition, "iou")
        detail = "boxes did not parse" if condition.get("parsed") is False else f"IoU {v.decimal(iou)}"
    elif name == "sparse":
        detail = "fell back to all tokens" if condition.get("fallback") else kept_text
    return {
        "name": v.label(name),
        "text": _shortened(str(condition.get("text") or "")),
        "letter": str(letter or v.DASH),
        "verdict": "right" if condition.get("correct") else "no answer" if letter is None else "wrong",
        "detail": detail,
    }


def _grid(case: Mapping[str, Any]) -> TokenGrid | None:
    rows = case.get("grid")
    if not rows:
        return None
    with _named(case, "field 'grid'"):
        return TokenGrid.joined([_grid_of_image(one) for one in (case, *case.get("others", ()))])


def _grid_of_image(stored: Mapping[str, Any]) -> TokenGrid:
    views = tuple(View(Rect(*row["rect"]), row["rows"], row["cols"]) for row in stored["grid"])
    return TokenGrid(views, Rect(*stored.get("shown", WHOLE_IMAGE.as_tuple())))


def _boxes(case: Mapping[str, Any], rows: Sequence[Sequence[float]] | None, name: str) -> list[Box]:
    with _named(case, f"field {name!r}"):
        return [Box.from_json(row) for row in rows or ()]


@contextmanager
def _named(case: Mapping[str, Any], place: str) -> Iterator[None]:
    """A value that cannot be used is an error that names the case and the place."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise v.ResultsError(f"case {case.get('id')!r}, {place}: {error}") from error


def _field(case: Mapping[str, Any], name: str) -> Any:
    if name not in case:
        raise v.ResultsError(f"case {case.get('id')!r} has no field {name!r}; write cases.jsonl with `vitos eval`")
    return case[name]


def _shortened(text: str) -> str:
    rest = len(text) - MAX_CHARACTERS
    return text if rest <= 0 else f"{text[:MAX_CHARACTERS]} … ({rest} more characters in cases.jsonl)"
