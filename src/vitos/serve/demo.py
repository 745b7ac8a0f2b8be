"""`vitos demo`: a page in the browser that shows what a model looks at; layout and events only (extra `demo`).

Everything that it computes is in `looking.py`, what it reads in `given.py`, its tables in `shown.py`. It needs no
network: fonts are the system's, analytics are off, nothing is shared. One question is answered at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from vitos.policy import Limits, SparseVLM
from vitos.reports.overlay import PREDICTED_COLOUR, draw_overlay
from vitos.serve import shown
from vitos.serve.given import (
    Example,
    Point,
    WindowRange,
    box_between,
    draw_examples,
    fitting,
    format_boxes,
    image_name,
    open_image,
    parse_boxes,
    window_range,
)
from vitos.serve.looking import look, plans_of

CSS = (Path(__file__).parent / "demo.css").read_text(encoding="utf-8")
NOTICE = "Research use only; not a medical device."
FILE_HELP = "PNG, JPEG, TIFF, DICOM, NIfTI …"
MAX_UPLOAD = "512mb"
CACHE_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Opened:
    """The image on the page.

    Attributes:
        file: path of the file, without selector.
        size: width and height of its preview in pixels, in which clicks are counted.
        window: what the sliders may be set to; None: the image has no window.
        corner: the first corner of a box that is being drawn, in fractions.
        part: which frame or slice of the file.
    """

    file: str
    size: tuple[int, int]
    window: WindowRange | None
    corner: Point | None = None
    part: str = ""

    def name(self, centre: float, width: float) -> Path:
        """The file with its selector; sliders that stand on the file's own window leave it as it is."""
        own = self.window
        if own is None or (abs(centre - own.window[0]) < own.step and abs(width - own.window[1]) < own.step):
            return image_name(self.file, self.part)
        return image_name(self.file, self.part, (centre, width))


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend becomes a message on the page, without a traceback; as the command line's `main` does."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        raise gr.Error(str(error), duration=None, title="That did not work", print_exception=False) from error


# --- events ---------------------------------------------------------------------------------------------------------


class Handlers:
    """What happens on the page; every method returns the new values of the components that it changes."""

    def __init__(self, vlm: SparseVLM, limits: Limits = Limits()) -> None:
        self.vlm = vlm
        self.limits = limits

    def open(self, file: str | None, part: str = "") -> tuple[Any, ...]:
        """Show a file: opened, preview, facts, centre, width, boxes."""
        if not file:
            hidden = gr.update(visible=False)
            return None, None, "", hidden, hidden, ""
        with told():
            picture, facts = open_image(image_name(file, part))
        drawn = draw_overlay(fitting(picture), None, None, ())
        own = window_range(facts)
        text = "\n\n".join([facts.summary(), *(f"Warning: {warning}" for warning in facts.warnings)])
        opened = Opened(str(file), drawn.size, own, part=part)
        if own is None:
            sliders = gr.update(visible=False), gr.update(visible=False)
        else:
            centre, width = own.window
            sliders = (
                gr.update(visible=True, minimum=own.low, maximum=own.high, step=own.step, value=centre),
                gr.update(visible=True, minimum=1, maximum=own.widest, step=own.step, value=width),
            )
        return opened, drawn, text, *sliders, ""

    def reopen(self, opened: Opened | None, part: str) -> tuple[Any, ...]:
        """`open` with another frame or slice of the same file."""
        return self.open(opened.file if opened else None, part)

    def draw(self, opened: Opened | None, centre: float, width: float, boxes: str) -> Image.Image | None:
        """The preview in its window, with the boxes and the corner that was clicked."""
        if opened is None:
            return None
        with told():
            picture, _ = open_image(opened.name(centre, width))
            drawn = draw_overlay(fitting(picture), None, None, parse_boxes(boxes))
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
            return None, boxes, drawn
        x, y = event.index[0] / opened.size[0], event.index[1] / opened.size[1]
        if opened.corner is None:
            return replace(opened, corner=(x, y)), boxes, drawn
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
        """The three ways: three overlays, table, thoughts, and the model's or the person's boxes as text."""
        with told():
            if opened is None:
                raise ValueError("Choose an example or a file first.")
            name, given = opened.name(centre, width), parse_boxes(boxes)
            looks = look(
                self.vlm, name, question, plan, budget=budget, boxes=given, seed=int(seed or 0), limits=self.limits
            )
        pictures = [gr.update(value=x.picture, label=shown.title(x), alt_text=shown.title(x)) for x in looks]
        found = format_boxes(looks.sparse.finding.boxes)
        return *pictures, shown.results_table(looks, question), shown.thoughts(looks, question), found


# --- layout ---------------------------------------------------------------------------------------------------------


def build(vlm: SparseVLM, examples: list[Example], model: str = "nano", limits: Limits = Limits()) -> gr.Blocks:
    """The page.

    Args:
        examples: pictures and questions with a button each.
        model: name of the checkpoint, as shown.
        limits: of both branches.
    """
    handlers = Handlers(vlm, limits)
    plans, refusals = plans_of(vlm)
    with gr.Blocks(
        title="vitos demo", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.HTML(
            f"<h1>vitos demo</h1><p>Model: <b>{shown.escape(model)}</b>. Which visual tokens does an answer need? "
            f"<strong>{NOTICE}</strong></p>",
            elem_id="top",
        )
        opened, drawn, found = gr.State(None), gr.State(0), gr.State("")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                buttons = _example_buttons(examples)
                file = gr.File(label=f"Your image ({FILE_HELP})", height=90, elem_id="file")
                part = gr.Textbox(label="Frame or slice, if the file has several", placeholder="frame=3", max_lines=1)
                question = gr.Textbox(
                    label="Question, one option a line", lines=5, max_lines=9, elem_id="question",
                    placeholder="What is the finding in the left lung?\nA. nodule\nB. cyst",
                )  # fmt: skip
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=4, min_width=300):
                preview = gr.Image(
                    label="Image: click two opposite corners to draw a box", interactive=False, format="png",
                    height=400, elem_id="preview", buttons=[], alt_text="The image that the question is about",
                )  # fmt: skip
                facts = gr.Textbox(label="File", interactive=False, max_lines=3, elem_id="facts")
                centre = gr.Slider(label="Window centre", visible=False, elem_id="centre")
                width = gr.Slider(label="Window width", visible=False, elem_id="width")
            with gr.Column(scale=3, min_width=240):
                plan = gr.Dropdown(
                    list(plans), value=plans[0], label="Plan", info=" ".join(refusals) or None, elem_id="plan"
                )
                budget = gr.Slider(
                    0, 1, value=0, step=0.01, label="Budget: share of the tokens", info="0: the boxes as they are",
                    elem_id="budget",
                )  # fmt: skip
                boxes = gr.Textbox(
                    label="Your boxes: x1, y1, x2, y2 from 0 to 1, one a line", lines=2, max_lines=6,
                    info="Empty: the model localizes. Shift+Enter asks.", elem_id="boxes",
                )  # fmt: skip
                with gr.Row():
                    take = gr.Button("Edit the model's boxes", size="sm", elem_id="take", min_width=100)
                    clear = gr.Button("Clear boxes", size="sm", elem_id="clear", min_width=100)
                seed = gr.Number(0, label="Seed of the random tokens", precision=0, minimum=0, elem_id="seed")
        with gr.Row():
            pictures = [
                gr.Image(
                    label=title, interactive=False, format="png", height=280, elem_id=name, buttons=["fullscreen"]
                )
                for name, title in shown.TITLES.items()
            ]
        table = gr.HTML(elem_id="results")
        thoughts = gr.HTML(elem_id="thoughts")

        shows = [opened, preview, facts, centre, width, boxes]
        for button, example in zip(buttons, examples, strict=True):
            button.click(partial(_fill, example), None, [file, question, part], api_visibility="private")
            button.click(partial(handlers.open, str(example.image)), None, shows, api_visibility="private")
        gr.on([file.upload, file.clear], handlers.open, file, shows, api_visibility="private")
        part.submit(handlers.reopen, [opened, part], shows, api_visibility="private")
        preview.select(handlers.click, [opened, boxes, drawn], [opened, boxes, drawn], api_visibility="private")
        clear.click(handlers.clear, opened, [opened, boxes], api_visibility="private")
        take.click(lambda text: text, found, boxes, api_visibility="private")
        gr.on(
            [centre.change, width.change, boxes.change, opened.change], handlers.draw, [opened, centre, width, boxes],
            preview, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
        gr.on(
            [ask.click, question.submit, boxes.submit, drawn.change], handlers.ask,
            [opened, centre, width, question, plan, budget, boxes, seed], [*pictures, table, thoughts, found],
            concurrency_limit=1, trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
    return page


def _example_buttons(examples: list[Example]) -> list[gr.Button]:
    with gr.Row(elem_id="examples"):
        return [
            gr.Button(e.question.splitlines()[0], icon=e.image, size="sm", min_width=130, elem_classes="example")
            for e in examples
        ]


def _fill(example: Example) -> tuple[None, str, str]:
    """No file, the example's question, no part."""
    return None, example.question, ""


def launch(
    vlm: SparseVLM, *, model: str = "nano", host: str = "127.0.0.1", port: int | None = 7860, block: bool = True
) -> tuple[gr.Blocks, str]:
    """Serve the page; returns it and its address, with `block` after it was stopped.

    Args:
        port: None: a free one from 7860 on.

    Raises:
        OSError: if the port is taken.
    """
    folder = tempfile.mkdtemp(prefix="vitos-demo-")
    page = build(vlm, draw_examples(Path(folder)), model)
    # Bare names would be looked up at Google.
    sans, mono = gr.themes.Font("sans-serif"), gr.themes.Font("monospace")
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, show_error=False, max_file_size=MAX_UPLOAD,
        theme=theme, css=CSS, footer_links=[], ssr_mode=False, enable_monitoring=False, run_history=False, pwa=False, prevent_thread_lock=not block,
        allowed_paths=[folder],
    )  # fmt: skip
    return page, address
