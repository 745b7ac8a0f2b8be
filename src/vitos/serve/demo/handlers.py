"""The events of the demo's page: each gives new values for the components that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from vitos.policy.plans import Limits
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import PREDICTED_COLOUR, draw_overlay
from vitos.serve.demo import render
from vitos.serve.demo.compare import compare, compare_plans
from vitos.serve.demo.inputs import (
    Point,
    WindowRange,
    box_between,
    fitting,
    format_boxes,
    image_name,
    may_have_parts,
    open_image,
    parse_boxes,
    readable_boxes,
    window_range,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageImage:
    """The image on the page.

    Attributes:
        file: path of the file, without selector.
        size: width and height of its preview in pixels, the unit of clicks.
        window: range of the sliders; None: the image has no window.
        part: frame or slice of the file, as a selector.
        corner: first corner of a box that is being drawn, in fractions.
    """

    file: str
    size: tuple[int, int]
    window: WindowRange | None
    part: str = ""
    corner: Point | None = None

    def name(self, centre: float | None, width: float | None) -> Path:
        """The file with its selector, and a window if the sliders show another than the file's own."""
        if self.window is None or centre is None or width is None:
            return image_name(self.file, self.part)
        return image_name(self.file, self.part, self.window.chosen(centre, width))


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show an error that a user can correct as a message on the page, without a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        raise gr.Error(str(error), title="That did not work", print_exception=False) from error


class Handlers:
    """The events of the page of one model.

    A method's docstring names the components whose new values it returns, in their order.
    """

    def __init__(self, vlm: SparseVLM, limits: Limits = Limits()) -> None:
        self.vlm = vlm
        self.limits = limits

    def open(self, file: str | None, part: str = "") -> tuple[Any, ...]:
        """Show a file: opened, preview, facts, part, centre, width, boxes.

        For a file that cannot be used, the reason is shown in place of its facts, and there is no image; the field for
        a frame stays, since naming one may be the remedy.
        """
        hidden = gr.update(visible=False)
        if not file:
            return None, None, "", hidden, hidden, hidden, ""
        parts = gr.update(visible=may_have_parts(file))
        try:
            picture, facts = open_image(image_name(file, part))
        except ValueError as error:
            gr.Warning(str(error), title="This file cannot be used")
            return None, None, str(error), parts, hidden, hidden, ""
        drawn, own = draw_overlay(fitting(picture), None, None, ()), window_range(facts)
        text = "\n".join([facts.summary(), *(f"Warning: {warning}" for warning in facts.warnings)])
        sliders = [hidden, hidden]
        if own is not None:
            # A slider sends 0 when it comes into view, so its range must hold 0; `WindowRange.chosen` corrects it.
            limits = ((min(own.low, 0), max(own.high, 0)), (0, own.widest))
            sliders = [
                gr.update(visible=True, minimum=low, maximum=high, step=own.step, value=value)
                for (low, high), value in zip(limits, own.window, strict=True)
            ]
        opened = PageImage(file=str(file), size=drawn.size, window=own, part=part)
        return opened, drawn, text, parts, *sliders, ""

    def draw(self, opened: PageImage | None, centre: float, width: float, boxes: str) -> Image.Image | None:
        """The preview in its window, with the boxes and the corner that was clicked."""
        if opened is None:
            return None
        with errors_on_page():
            picture, _ = open_image(opened.name(centre, width))
        drawn = draw_overlay(fitting(picture), None, None, readable_boxes(boxes))
        if opened.corner is not None:
            x, y = (v * side for v, side in zip(opened.corner, drawn.size, strict=True))
            arm, pen = max(drawn.size) / 40, ImageDraw.Draw(drawn)
            for colour, line in (((0, 0, 0), 5), (PREDICTED_COLOUR, 3)):
                pen.line((x - arm, y, x + arm, y), colour, line)
                pen.line((x, y - arm, x, y + arm), colour, line)
        return drawn

    def click(self, opened: PageImage | None, boxes: str, drawn: int, event: gr.SelectData) -> tuple[Any, ...]:
        """Set the first or second corner of a box: opened, boxes, number of boxes drawn so far."""
        if opened is None:
            return None, gr.skip(), gr.skip()
        x, y = event.index[0] / opened.size[0], event.index[1] / opened.size[1]
        if opened.corner is None:
            # Skip instead of returning `boxes`: the first click of a drag must not overwrite what the second writes.
            return replace(opened, corner=(x, y)), gr.skip(), gr.skip()
        with errors_on_page():
            added = (*parse_boxes(boxes), box_between(opened.corner, (x, y)))
        return replace(opened, corner=None), format_boxes(added), drawn + 1

    def clear(self, opened: PageImage | None) -> tuple[Any, ...]:
        """Remove the boxes and the corner: opened, boxes."""
        return (replace(opened, corner=None) if opened else None), ""

    def ask(
        self,
        opened: PageImage | None,
        centre: float,
        width: float,
        question: str,
        plan: Any,
        budget: float,
        boxes: str,
        seed: float,
    ) -> tuple[Any, ...]:
        """Compare dense, sparse and random: three headings, three pictures, table, thoughts, sparse boxes."""
        with errors_on_page():
            name, given = _name(opened, centre, width), parse_boxes(boxes)
            compared = compare(
                self.vlm, name, question, plan, budget=budget, boxes=given, seed=int(seed or 0), limits=self.limits
            )
        headings = [render.heading(answer, question) for answer in compared]
        pictures = [gr.update(value=answer.picture, alt_text=render.title(answer)) for answer in compared]
        table, thoughts = render.results_table(compared, question), render.thoughts(compared, question)
        return *headings, *pictures, table, thoughts, format_boxes(compared.answers[1].finding.boxes)

    def ask_all(
        self, opened: PageImage | None, centre: float, width: float, question: str, budget: float, boxes: str
    ) -> tuple[str, str]:
        """Compare dense and all plans: table and thoughts."""
        with errors_on_page():
            name, given = _name(opened, centre, width), parse_boxes(boxes)
            compared = compare_plans(self.vlm, name, question, budget=budget, boxes=given, limits=self.limits)
        return render.results_table(compared, question), render.thoughts(compared, question)


def _name(opened: PageImage | None, centre: float, width: float) -> Path:
    if opened is None:
        raise ValueError("Choose an example or a file first.")
    return opened.name(centre, width)
