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
from vitos.serve.demo.compare import plans_of
from vitos.serve.demo.guard import HostNames, SameOrigin
from vitos.serve.demo.handlers import CACHE_SECONDS, HEADINGS, Handlers, Session
from vitos.serve.demo.inputs import Example, draw_examples, record_examples
from vitos.serve.demo.private import PAGES

HERE = Path(__file__).parent
MAX_UPLOAD = "512mb"
OPENED_AT_ONCE = 4
"""Number of files that each way to open one reads at the same time; the last one is shown."""
PICTURE_HEIGHT = 262
BOXES_HELP = "x1, y1, x2, y2 from 0 to 1, one box a line. Empty: the model localizes. Shift+Enter asks."
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
    handlers = Handlers(vlm, folder, limits)
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
        c.session, c.drawn = gr.State(Session()), gr.State(0)
        with gr.Row(elem_id="examples"):
            c.buttons = [
                gr.Button(e.title, icon=e.icon, size="sm", min_width=150, elem_classes="example") for e in examples
            ]
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                c.file = gr.File(label="Your image: PNG, JPEG, TIFF, DICOM, NIfTI", height=120, elem_id="file")
                c.facts = gr.Textbox(label="File", interactive=False, max_lines=6, elem_id="facts")
                c.part = gr.Textbox(
                    label="Frame or slice", info="frame=3, or axis=2&slice=40; Enter shows it", max_lines=1,
                    visible=False, elem_id="part",
                )  # fmt: skip
                c.centre = gr.Slider(label="Window centre", visible=False, elem_id="centre")
                c.width = gr.Slider(label="Window width", visible=False, elem_id="width")
                c.question = gr.Textbox(
                    label="Question, each option on a line", lines=5, max_lines=9, placeholder=EMPTY_QUESTION,
                    elem_id="question",
                )  # fmt: skip
                c.plan = gr.Dropdown(plans, value=plans[0], label="Plan", info=" ".join(refusals), elem_id="plan")
                c.budget = gr.Slider(
                    0, 1, value=0, step=0.01, label="Budget", info="Share of the tokens; 0: the boxes as they are",
                    elem_id="budget",
                )  # fmt: skip
                with gr.Row():
                    c.ask = gr.Button("Ask", variant="primary", min_width=120, elem_id="ask")
                    c.ask_all = gr.Button("All plans", min_width=120, elem_id="ask-all")
                c.boxes = gr.Textbox(label="Your boxes", lines=2, max_lines=6, info=BOXES_HELP, elem_id="boxes")
                with gr.Row():
                    c.take = gr.Button("Edit the model's boxes", size="sm", min_width=120, elem_id="take")
                    c.clear = gr.Button("Clear boxes", size="sm", min_width=120, elem_id="clear")
                c.seed = gr.Number(0, label="Seed of the random tokens", precision=0, minimum=0, elem_id="seed")
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    _, c.preview = _picture("preview", "<b>Image</b><br>drag a box, or click two corners")
                    sparse = _picture("sparse", HEADINGS["sparse"])
                with gr.Row():
                    c.shown = _picture("dense", HEADINGS["dense"]), sparse, _picture("random", HEADINGS["random"])
                c.table = gr.HTML(elem_id="results")
                c.thoughts = gr.HTML(elem_id="thoughts")
        _connect(handlers, examples, c)
    return page


def _connect(handlers: Handlers, examples: Sequence[Example], c: SimpleNamespace) -> None:
    """Join the components `c` of the page to its events."""
    on = partial(gr.on, api_visibility="private")
    then = {"api_visibility": "private", "show_progress": "hidden"}
    drawing: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    # Without `preprocess`: it would refuse a slider's value from before its range changed; `Handlers` corrects it.
    raw: dict[str, Any] = {"preprocess": False}
    window = [c.session, c.centre, c.width]
    subject = [*window, c.question]

    results = [*(heading for heading, _ in c.shown), *(picture for _, picture in c.shown), c.table, c.thoughts]
    model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    begin = partial(on, fn=handlers.begin, inputs=subject, outputs=results, queue=False, **drawing, **raw)
    asking = begin([c.ask.click, c.question.submit, c.boxes.submit, c.drawn.change]).then(
        handlers.ask,
        [*subject, c.plan, c.budget, c.boxes, c.seed],
        results,
        trigger_mode="always_last",
        **model,
        **raw,
    )
    asking_all = begin([c.ask_all.click]).then(
        handlers.ask_all, [*subject, c.budget, c.boxes], [c.table, c.thoughts], **model, **raw
    )
    # The browser drops the answers that are still being computed; the handlers do not rely on it.
    stale: dict[str, Any] = {"cancels": [asking, asking_all]}
    changes = [c.centre.change, c.width.change, c.question.input]
    on(changes, handlers.change, subject, results, queue=False, **drawing, **raw, **stale)

    shows = [c.preview, c.facts, c.part, c.centre, c.width, c.boxes, *results]
    opening: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": OPENED_AT_ONCE} | stale
    for button, example in zip(c.buttons, examples, strict=True):
        opens = partial(handlers.open_example, example=example)
        on(button.click, opens, c.session, [c.file, c.question, *shows], **opening)
    on([c.file.upload, c.file.clear], handlers.open, [c.session, c.file], shows, **opening)
    on(c.part.submit, handlers.open_part, [c.session, c.part], shows, **opening)

    sparse_shown = list(c.shown[1])
    on(c.budget.input, handlers.slide, [*window, c.boxes, c.budget], sparse_shown, queue=False, **drawing, **raw)
    draw: tuple[Any, ...] = (handlers.draw, [*window, c.boxes], c.preview)
    on([c.centre.change, c.width.change, c.boxes.change], *draw, **drawing, **raw)
    clicked = on(
        c.preview.select, handlers.click, [c.session, c.boxes, c.drawn], [c.boxes, c.drawn],
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
