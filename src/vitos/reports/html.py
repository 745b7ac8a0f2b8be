"""The report of an evaluation: one HTML file that needs nothing else, for reading, mailing and printing.

Model text, questions and file names are untrusted: the template escapes all of them, and the page forbids scripts and
anything from outside by its content security policy.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.data.files import write_text_atomic
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports import table
from vitos.reports import values as v
from vitos.reports.card import RESEARCH_ONLY
from vitos.reports.curves import pareto, training_curves
from vitos.reports.overlay import GOLD_COLOUR, PREDICTED_COLOUR, draw_overlay
from vitos.reports.summary import summary

MAX_CASES = 24
MAX_SIDE = 640
MAX_CHARACTERS = 1200
# Conditions whose text stands under a case, in this order.
SHOWN_CONDITIONS = ("localization", "sparse", "random")


_ORIGIN = (("Checkpoint", "checkpoint"), ("Base model", "base"), ("vitos", "vitos_version"), ("Command", "command"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What one condition wrote; `verdict` is right, wrong or no answer."""

    name: str
    text: str
    letter: str
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class CaseView:
    """A case as the template shows it; `image` is a data URI."""

    id: str
    template: str
    image: str
    width: int
    height: int
    alt: str
    question: str
    gold: str
    answers: tuple[Answer, ...]


def write_report(
    run_dir: Path,
    results: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]] = (),
    out: Path | None = None,
) -> None:
    """Write the report atomically.

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
    budgets = table.budget_sheet(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("vitos.reports").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        title=table.headline(results),
        research_only=RESEARCH_ONLY,
        summary=summary(results),
        main=table.main_sheet(results),
        controls=table.control_sheet(results),
        comparisons=table.comparison_sheet(results),
        groupings=[s for s in (table.dataset_sheet(results), table.template_sheet(results)) if s],
        budgets=budgets,
        pareto=_figure_uri(pareto(results)) if budgets else None,
        stages=table.stage_sheet(results),
        curves=_figure_uri(training_curves(metrics)) if metrics else None,
        groups=[
            ("Answered rightly", [_view(case, run_dir) for case in right]),
            ("Answered wrongly", [_view(case, run_dir) for case in wrong]),
        ],
        num_cases=len(cases),
        per_group=MAX_CASES // 2,
        origin=[(name, results[key]) for name, key in _ORIGIN if results.get(key)],
        predicted_colour="#" + bytes(PREDICTED_COLOUR).hex(),
        gold_colour="#" + bytes(GOLD_COLOUR).hex(),
    )
    write_text_atomic(out or run_dir / "report.html", page)


def select_cases(
    cases: Sequence[Mapping[str, Any]], per_group: int = MAX_CASES // 2
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The first cases that the sparse branch got right and wrong, spread over the templates; test-set order.

    The templates take turns, in the order of their first case, until `per_group` cases are chosen or none is left.
    Nothing else about a case matters, so the choice cannot flatter. Cases without a sparse verdict are left out.
    """
    return _spread(cases, True, per_group), _spread(cases, False, per_group)


def _spread(cases: Sequence[Mapping[str, Any]], correct: bool, count: int) -> list[Mapping[str, Any]]:
    queues: dict[object, list[int]] = {}
    for index, case in enumerate(cases):
        if (_field(case, "conditions").get("sparse") or {}).get("correct") is correct:
            queues.setdefault(case.get("template"), []).append(index)
    turns = sorted((turn, index) for queue in queues.values() for turn, index in enumerate(queue))
    return [cases[index] for index in sorted(index for _, index in turns[:count])]


# --- one case -------------------------------------------------------------------------------------------------------


def _view(case: Mapping[str, Any], run_dir: Path) -> CaseView:
    conditions = _field(case, "conditions")
    located, sparse = conditions.get("localization") or {}, conditions.get("sparse") or {}
    image = load_image(without_crop(run_dir / _field(case, "image")))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    grid = _grid(case)
    kept = sparse.get("kept") if grid else None
    boxes = _boxes(case, located.get("boxes"), "conditions.localization.boxes")
    gold = _boxes(case, case.get("gold_boxes"), "gold_boxes")
    try:
        picture = draw_overlay(image, grid, kept, boxes, gold)
    except ValueError as error:
        raise v.ResultsError(f"case {case.get('id')!r}, condition 'sparse': {error}") from error
    kept_text = f"{len(kept)} of {grid.num_tokens} visual tokens kept" if kept is not None and grid else "all tokens"
    return CaseView(
        id=str(_field(case, "id")),
        template=str(case.get("template") or ""),
        image=_image_uri(picture),
        width=picture.width,
        height=picture.height,
        alt=f"Image of case {case.get('id')}: {kept_text}, {len(boxes)} predicted and {len(gold)} gold boxes.",
        question=_shortened(str(_field(case, "question")).replace(IMAGE_PLACEHOLDER, "").strip()),
        gold=str(case.get("gold") or v.DASH),
        answers=tuple(
            _answer(name, condition, kept_text)
            for name in SHOWN_CONDITIONS
            if (condition := conditions.get(name)) is not None
        ),
    )


def _answer(name: str, condition: Mapping[str, Any], kept_text: str) -> Answer:
    letter = condition.get("answer")
    verdict = "right" if condition.get("correct") else "no answer" if letter is None else "wrong"
    detail = ""
    if name == "localization":
        iou = v.share(condition, "iou")
        detail = "boxes did not parse" if condition.get("parsed") is False else f"IoU {v.decimal(iou)}"
    elif name == "sparse":
        detail = "fell back to all tokens" if condition.get("fallback") else kept_text
    return Answer(v.label(name), _shortened(str(condition.get("text") or "")), str(letter or v.DASH), verdict, detail)


def _grid(case: Mapping[str, Any]) -> TokenGrid | None:
    rows = case.get("grid")
    if not rows:
        return None
    try:
        views = tuple(View(Rect(*row["rect"]), row["rows"], row["cols"]) for row in rows)
        return TokenGrid(views, Rect(*case.get("shown", WHOLE_IMAGE.as_tuple())))
    except (KeyError, TypeError, ValueError) as error:
        raise v.ResultsError(f"case {case.get('id')!r}, field 'grid': {error}") from error


def _boxes(case: Mapping[str, Any], rows: Sequence[Sequence[float]] | None, name: str) -> list[Box]:
    try:
        return [Box(*row) for row in rows or ()]
    except (TypeError, ValueError) as error:
        raise v.ResultsError(f"case {case.get('id')!r}, field {name!r}: {error}") from error


def _field(case: Mapping[str, Any], name: str) -> Any:
    if name not in case:
        raise v.ResultsError(f"case {case.get('id')!r} has no field {name!r}; write cases.jsonl with `vitos eval`")
    return case[name]


def _shortened(text: str) -> str:
    rest = len(text) - MAX_CHARACTERS
    return text if rest <= 0 else f"{text[:MAX_CHARACTERS]} … ({rest} more characters in cases.jsonl)"


# --- data URIs ------------------------------------------------------------------------------------------------------


def _image_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Full colour resolution: the thin coloured lines are what the picture is for.
    image.save(buffer, "JPEG", quality=86, subsampling=0, optimize=True)
    return _uri("image/jpeg", buffer)


def _figure_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, transparent=True)
    return _uri("image/png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
