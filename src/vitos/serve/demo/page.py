"""The demo's page: its layout, which events it has, and how it is served.

It needs no network: the fonts are the system's, analytics and the browser's history of runs are off, and nothing is
shared. One question is answered at a time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from starlette.applications import Starlette

from vitos.policy.plans import Limits
from vitos.policy.vlm import SparseVLM
from vitos.serve import NOTICE
from vitos.serve.demo.compare import BOXES, DRAWN, RECTANGLES, SCORES, plans_of
from vitos.serve.demo.examples import Example, draw_examples, record_examples
from vitos.serve.demo.files import CACHE_SECONDS
from vitos.serve.demo.guard import HostNames, SameOrigin
from vitos.serve.demo.handlers import Handlers
from vitos.serve.demo.opening import HEADINGS, heading_of
from vitos.serve.demo.private import PAGES
from vitos.serve.demo.session import Session

HERE = Path(__file__).parent
MAX_UPLOAD = "512mb"
OPENED_AT_ONCE = 4
"""Number of files that each way to open one reads at the same time; the last one is shown."""
PICTURE_HEIGHT = 262
BOXES_HELP = (
    "x1, y1, x2, y2 from 0 to 1, one box a line; with several pictures, 2: x1, y1, x2, y2 is in the second. "
    "Empty: the model localizes. Shift+Enter asks."
)
SLICES_HELP = "Empty: the slice that is shown. Several: 12 evenly, every 4th, 10-40 or all; Enter takes it."
DRAW = {
    "Boxes": BOXES,
    "Scores of the head": SCORES,
    "Rectangles around kept cells": RECTANGLES,
}
EMPTY_QUESTION = "What is the finding in the left lung?\nA. nodule\nB. cyst"


def build(
    vlm: SparseVLM, examples: list[Example], folder: Path, model: str = "nano", limits: Limits = Limits()
) -> gr.Blocks:
    """The page.

    Args:
        examples: pictures and questions, each shown as a button.
        folder: existing folder for the pictures of the page.
        model: name of the checkpoint, as it is shown.
        limits: longest responses of both branches.
    """
    handlers = Handlers(vlm, folder, limits, examples, model)
    plans, refusals = plans_of(vlm)
    page: gr.Blocks
    c = SimpleNamespace()
    with gr.Blocks(
        title="vitos demo", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.HTML(
            f"<h1>vitos demo</h1><p>Which visual tokens does an answer need? Model: <b>{escape(model)}</b>. "
            f"<strong>{NOTICE}</strong></p>",
            elem_id="top",
        )
        c.session, c.drawn, c.redone = gr.State(Session()), gr.State(0), gr.State(0)
        c.address = gr.Textbox(visible=False)
        with gr.Row(elem_id="examples"):
            c.buttons = [
                gr.Button(e.title, icon=e.icon, size="sm", min_width=150, elem_classes="example") for e in examples
            ]
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                _inputs(c, plans, " ".join(refusals))
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    c.heading, c.preview = _picture("preview", heading_of(None))
                    sparse = _picture("sparse", HEADINGS["sparse"])
                with gr.Row():
                    c.shown = _picture("dense", HEADINGS["dense"]), sparse, _picture("random", HEADINGS["random"])
                c.draw = gr.CheckboxGroup(
                    list(DRAW.items()), value=list(DRAWN), label="Draw on the pictures", elem_id="draw"
                )
                c.link = gr.HTML(elem_id="link-line")
                c.figures = gr.HTML(elem_id="figures")
                c.table = gr.HTML(elem_id="results")
                c.thoughts = gr.HTML(elem_id="thoughts")
        c.load = page.load
        _connect(handlers, examples, c)
    return page


def _inputs(c: SimpleNamespace, plans: Sequence[str], refusals: str) -> None:
    """The column of what a person gives."""
    c.file = gr.File(
        label="Your image or images: PNG, JPEG, TIFF, DICOM, NIfTI",
        file_count="multiple",
        height=120,
        elem_id="file",
    )
    c.facts = gr.Textbox(label="File", interactive=False, max_lines=6, elem_id="facts")
    c.frame = gr.Slider(1, 2, step=1, label="Frame, slice or image", visible=False, elem_id="frame")
    c.thumbs = gr.HTML(elem_id="thumbs")
    c.axis = gr.Radio(["0", "1", "2"], label="Axis that slices cut, as stored", visible=False, elem_id="axis")
    c.slices = gr.Textbox(label="Slices asked about", info=SLICES_HELP, max_lines=1, visible=False, elem_id="slices")
    c.centre = gr.Slider(label="Window centre", visible=False, elem_id="centre")
    c.width = gr.Slider(label="Window width", visible=False, elem_id="width")
    c.question = gr.Textbox(
        label="Question, each option on a line", lines=5, max_lines=9, placeholder=EMPTY_QUESTION, elem_id="question"
    )
    c.plan = gr.Dropdown(plans, value=plans[0], label="Plan", info=refusals, elem_id="plan")
    c.budget = gr.Slider(
        0,
        1,
        value=0,
        step=0.01,
        label="Budget",
        info="Share of the tokens; 0: as without a budget",
        elem_id="budget",
    )
    with gr.Row():
        c.ask = gr.Button("Ask", variant="primary", min_width=120, elem_id="ask")
        c.ask_all = gr.Button("All plans", min_width=120, elem_id="ask-all")
    c.boxes = gr.Textbox(label="Your boxes", lines=2, max_lines=6, info=BOXES_HELP, elem_id="boxes")
    with gr.Row():
        c.take = gr.Button("Edit the model's boxes", size="sm", min_width=120, elem_id="take")
        c.clear = gr.Button("Clear boxes", size="sm", min_width=120, elem_id="clear")
    c.seed = gr.Number(0, label="Seed of the random tokens", precision=0, minimum=0, elem_id="seed")


def _connect(handlers: Handlers, examples: Sequence[Example], c: SimpleNamespace) -> None:
    """Join the components `c` of the page to its events."""
    on = partial(gr.on, api_visibility="private")
    drawing: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    # Without `preprocess`: it would refuse a slider's value from before its range changed; `Handlers` corrects it.
    raw: dict[str, Any] = {"preprocess": False}
    subject = [c.session, c.centre, c.width, c.question]

    small = [*(picture for _, picture in c.shown), c.figures, c.link]
    results = [*(heading for heading, _ in c.shown), *small[:3], c.table, c.thoughts, *small[3:]]
    model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    begin = partial(on, fn=handlers.begin, inputs=subject, outputs=results, queue=False, **drawing, **raw)
    asking = begin([c.ask.click, c.question.submit, c.boxes.submit, c.drawn.change]).then(
        handlers.ask,
        [*subject, c.plan, c.budget, c.boxes, c.seed, c.draw],
        results,
        trigger_mode="always_last",
        **model,
        **raw,
    )
    asking_all = begin([c.ask_all.click, c.redone.change]).then(
        handlers.ask_all, [*subject, c.budget, c.boxes, c.draw], results, **model, **raw
    )
    # The browser drops the answers that are still being computed; the handlers do not rely on it.
    stale: dict[str, Any] = {"cancels": [asking, asking_all]}
    changed: tuple[Any, ...] = (handlers.change, subject, results)
    on([c.centre.change, c.width.change, c.question.input], *changed, queue=False, **drawing, **raw, **stale)
    redrawn: tuple[Any, ...] = (handlers.redraw, [c.session, c.draw], small)
    on(c.draw.input, *redrawn, **drawing)
    _connect_opening(handlers, examples, c, results, stale)
    _connect_pictures(handlers, c, changed, redrawn)


def _connect_opening(
    handlers: Handlers, examples: Sequence[Example], c: SimpleNamespace, results: list[Any], stale: dict[str, Any]
) -> None:
    """Files, examples and links."""
    on = partial(gr.on, api_visibility="private")
    shows = [
        c.preview, c.facts, c.heading, c.frame, c.axis, c.slices, c.centre, c.width, c.boxes, c.drawn, c.redone,
        *results,
    ]  # fmt: skip
    opening: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": OPENED_AT_ONCE} | stale
    thumbs: dict[str, Any] = {
        "fn": handlers.thumbnails, "inputs": c.session, "outputs": c.thumbs, "show_progress": "hidden",
        "api_visibility": "private",
    }  # fmt: skip
    for button, example in zip(c.buttons, examples, strict=True):
        opens = partial(handlers.open_example, example=example)
        on(button.click, opens, c.session, [c.file, c.question, *shows], **opening).then(**thumbs)
    on([c.file.upload, c.file.clear, c.file.delete], handlers.open, [c.session, c.file], shows, **opening).then(
        **thumbs
    )
    on(c.axis.input, handlers.open_axis, [c.session, c.axis], shows, **opening).then(**thumbs)
    linked = [c.plan, c.budget, c.seed, c.draw, c.file, c.question, *shows]
    address = "(session, address) => [session, window.location.search]"
    c.load(handlers.restore, [c.session, c.address], linked, js=address, api_visibility="private").then(**thumbs)
    c.chosen_thumbs = thumbs


def _connect_pictures(
    handlers: Handlers, c: SimpleNamespace, changed: tuple[Any, ...], redrawn: tuple[Any, ...]
) -> None:
    """Which picture is shown, its window, and boxes on it."""
    on = partial(gr.on, api_visibility="private")
    then: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    drawing: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    raw: dict[str, Any] = {"preprocess": False}
    window = [c.session, c.centre, c.width]

    turn: tuple[Any, ...] = (
        handlers.show,
        [c.session, c.frame, c.centre, c.width, c.boxes],
        [c.preview, c.facts, c.heading, c.centre, c.width],
    )
    on(c.frame.input, *turn, **drawing, **raw).then(*changed, **then, **raw).then(*redrawn, **then)
    chosen = on(c.slices.submit, handlers.choose, [c.session, c.slices], c.frame, **drawing)
    chosen.then(*turn, **then, **raw).then(*changed, **then, **raw).then(**c.chosen_thumbs)

    sliding = [*window, c.boxes, c.budget, c.draw]
    on(c.budget.input, handlers.slide, sliding, list(c.shown[1]), queue=False, **drawing, **raw)
    draw: tuple[Any, ...] = (handlers.draw, [*window, c.boxes], c.preview)
    on([c.centre.change, c.width.change, c.boxes.change], *draw, **drawing, **raw)
    clicked = on(
        c.preview.select, handlers.click, [c.session, c.boxes], [c.boxes, c.drawn],
        trigger_mode="multiple", show_progress="hidden",
    )  # fmt: skip
    clicked.then(*draw, **then, **raw)
    on(c.clear.click, handlers.clear, c.session, c.boxes).then(*draw, **then, **raw)
    on(c.take.click, handlers.take, c.session, c.boxes)


def _picture(name: str, heading: str) -> tuple[gr.HTML, gr.Image]:
    """A line and the picture below it; a label of the picture itself would hide pixels."""
    with gr.Column(min_width=200):
        above = gr.HTML(heading, elem_classes="heading", elem_id=f"{name}-heading")
        picture = gr.Image(
            show_label=False, interactive=False, format="png", height=PICTURE_HEIGHT, elem_id=name,
            buttons=[] if name == "preview" else ["fullscreen"], alt_text=f"{name}: nothing yet",
        )  # fmt: skip
    return above, picture


def theme() -> gr.themes.Base:
    """System fonts (Gradio looks up bare names at Google), and small print that is dark enough to read."""
    sans, mono = gr.themes.Font("sans-serif"), gr.themes.Font("monospace")
    base = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", spacing_size="sm", text_size="sm", font=sans, font_mono=mono
    )
    subdued = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    colours = dict.fromkeys(subdued, "*neutral_700") | {f"{name}_dark": "*neutral_200" for name in subdued}
    return base.set(
        **colours,
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
    )


def launch(
    vlm: SparseVLM,
    folder: Path,
    *,
    data: Sequence[Path] = (),
    model: str = "nano",
    host: str = "127.0.0.1",
    port: int | None = 7860,
    allow_hosts: Sequence[str] = (),
    block: bool = True,
    announce: Callable[[], None] = lambda: None,
) -> tuple[gr.Blocks, str]:
    """Serve the page; returns it and its address, with `block` only after it was stopped.

    Args:
        folder: folder for examples, uploads and pictures, that of `private_folder` or another temporary one.
        data: record files whose questions are the examples; empty: phantoms are drawn.
        port: port of the page; None: a free one from 7860 on.
        allow_hosts: names under which the page may be opened, besides `host` and this machine's own (`HostNames.of`).
        announce: called when all arguments have been checked, before the page is served.

    Raises:
        DataError: from `record_examples`.
        OSError: if the port is taken.
    """
    public, private = folder.resolve() / "examples", folder.resolve() / PAGES
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(private)  # as `private_folder` does
    examples = record_examples(data, public) if data else draw_examples(public)
    page = build(vlm, examples, private, model)
    if port is not None and _taken(host, port):
        raise OSError(f"port {port} of {host} cannot be used; choose another with --port")
    announce()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[str(public)],
        app_kwargs={"lifespan": partial(_guarded, hosts=HostNames.of(host, allow_hosts))},
        theme=theme(),
        css=(HERE / "demo.css").read_text(encoding="utf-8"),
        js=(HERE / "demo.js").read_text(encoding="utf-8"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=not block,
    )
    return page, address


@asynccontextmanager
async def _guarded(app: Starlette, hosts: HostNames) -> AsyncIterator[None]:
    """Put `SameOrigin` around an app that starts, and around the middleware that Gradio adds."""
    if app.middleware_stack is None:
        raise RuntimeError("the app started without its middleware; requests from other hosts would be answered")
    app.middleware_stack = SameOrigin(app.middleware_stack, hosts)
    yield


def _taken(host: str, port: int) -> bool:
    """Whether a port cannot be listened on: another program does, or the host is no address of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
