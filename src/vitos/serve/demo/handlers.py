"""What happens on the demo's page: each event's new values for the components that it changes."""

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
from vitos.serve.demo import render as shown
from vitos.serve.demo.compare import look, look_by_all
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


@dataclass(frozen=True, slots=True)
class Opened:
    """The image on the page.

    Attributes:
        file: path of the file, without selector.
        size: width and height of its preview in pixels, in which clicks are counted.
        window: what the sliders may be set to; None: the image has no window.
        part: which frame or slice of the file, as a selector.
        corner: the first corner of a box that is being drawn, in fractions.
    """

    file: str
    size: tuple[int, int]
    window: WindowRange | None
    part: str = ""
    corner: Point | None = None

    def name(self, centre: float | None, width: float | None) -> Path:
        """The file with its selector; sliders that stand on the file's own window leave it as it is."""
        own = self.window
        if own is None or centre is None or width is None or own.is_own(centre, width):
            return image_name(self.file, self.part)
        return image_name(self.file, self.part, own.clipped(centre, width))


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend becomes a message on the page, without a traceback; as the command line's `main` does."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        raise gr.Error(str(error), title="That did not work", print_exception=False) from error


class Handlers:
    """The page's events for one model."""

    def __init__(self, vlm: SparseVLM, limits: Limits = Limits()) -> None:
        self.vlm = vlm
        self.limits = limits

    def open(self, file: str | None, part: str = "") -> tuple[Any, ...]:
        """Show a file: opened, preview, facts, part, centre, width, boxes.

        A file that cannot be used leaves no image; what is wrong with it stands where its facts would, so that a frame
        can be named there.
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
            # A slider that comes into view says 0 at first, which must not be refused; `clipped` sees to the rest.
            limits = ((min(own.low, 0), max(own.high, 0)), (0, own.widest))
            sliders = [
                gr.update(visible=True, minimum=low, maximum=high, step=own.step, value=value)
                for (low, high), value in zip(limits, own.window, strict=True)
            ]
        return Opened(str(file), drawn.size, own, part), drawn, text, parts, *sliders, ""

    def draw(self, opened: Opened | None, centre: float, width: float, boxes: str) -> Image.Image | None:
        """The preview in its window, with the boxes and the corner that was clicked."""
        if opened is None:
            return None
        with told():
            picture, _ = open_image(opened.name(centre, width))
        drawn = draw_overlay(fitting(picture), None, None, readable_boxes(boxes))
        if opened.corner is not None:
            x, y = (v * side for v, side in zip(opened.corner, drawn.size, strict=True))
            arm, pen = max(drawn.size) / 40, ImageDraw.Draw(drawn)
            for colour, line in (((0, 0, 0), 5), (PREDICTED_COLOUR, 3)):
                pen.line((x - arm, y, x + arm, y), colour, line)
                pen.line((x, y - arm, x, y + arm), colour, line)
        return drawn

    def click(self, opened: Opened | None, boxes: str, drawn: int, event: gr.SelectData) -> tuple[Any, ...]:
        """The first or second corner of a box: opened, boxes, number of boxes drawn so far."""
        if opened is None:
            return None, gr.skip(), gr.skip()
        x, y = event.index[0] / opened.size[0], event.index[1] / opened.size[1]
        if opened.corner is None:
            # Not `boxes` unchanged: of a drag's two clicks, the first must not overwrite what the second writes.
            return replace(opened, corner=(x, y)), gr.skip(), gr.skip()
        with told():
            added = (*parse_boxes(boxes), box_between(opened.corner, (x, y)))
        return replace(opened, corner=None), format_boxes(added), drawn + 1

    def clear(self, opened: Opened | None) -> tuple[Any, ...]:
        """No boxes, no corner: opened, boxes."""
        return (replace(opened, corner=None) if opened else None), ""

    def ask(
        self,
        opened: Opened | None,
        centre: float,
        width: float,
        question: str,
        plan: Any,
        budget: float,
        boxes: str,
        seed: float,
    ) -> tuple[Any, ...]:
        """Dense, sparse and random: their headings, pictures, table, thoughts, and the sparse way's boxes as text."""
        with told():
            name = _opened(opened).name(centre, width)
            looks = look(
                self.vlm,
                name,
                question,
                plan,
                budget=budget,
                boxes=parse_boxes(boxes),
                seed=int(seed or 0),
                limits=self.limits,
            )
        headings = [shown.heading(way, question) for way in looks]
        pictures = [gr.update(value=way.picture, alt_text=shown.title(way)) for way in looks]
        table, thoughts = shown.results_table(looks, question), shown.thoughts(looks, question)
        return *headings, *pictures, table, thoughts, format_boxes(looks.sparse.finding.boxes)

    def ask_all(
        self, opened: Opened | None, centre: float, width: float, question: str, budget: float, boxes: str
    ) -> tuple[str, str]:
        """Dense and every plan: table and thoughts."""
        with told():
            name, given = _opened(opened).name(centre, width), parse_boxes(boxes)
            looks = look_by_all(self.vlm, name, question, budget=budget, boxes=given, limits=self.limits)
        return shown.results_table(looks, question), shown.thoughts(looks, question)


def _opened(opened: Opened | None) -> Opened:
    if opened is None:
        raise ValueError("Choose an example or a file first.")
    return opened
