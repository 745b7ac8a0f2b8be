"""The demo's page: its layout, which events it has, and how it is served.

It needs no network: the fonts are the system's, analytics and the browser's history of runs are off, and nothing is
shared. One question is answered at a time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from vitos.policy.plans import Limits
from vitos.policy.vlm import SparseVLM
from vitos.serve.demo.compare import plans_of
from vitos.serve.demo.handlers import Handlers
from vitos.serve.demo.inputs import Example, draw_examples, record_examples

HERE = Path(__file__).parent
NOTICE = "Research use only; not a medical device."
MAX_UPLOAD = "512mb"
CACHE_SECONDS = 3600
"""Age at which uploads and pictures are deleted; when the server stops, all of them are."""
PICTURE_HEIGHT = 262
BOXES_HELP = "x1, y1, x2, y2 from 0 to 1, one box a line. Empty: the model localizes. Shift+Enter asks."
EMPTY_QUESTION = "What is the finding in the left lung?\nA. nodule\nB. cyst"


def build(vlm: SparseVLM, examples: list[Example], model: str = "nano", limits: Limits = Limits()) -> gr.Blocks:
    """The page.

    Args:
        examples: pictures and questions, each shown as a button.
        model: name of the checkpoint, as it is shown.
        limits: longest responses of both branches.
    """
    handlers = Handlers(vlm, limits)
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
        c.opened, c.drawn, c.found = gr.State(None), gr.State(0), gr.State("")
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
            with gr.Column(scale=5, min_width=480):
                with gr.Row():
                    _, c.preview = _picture("preview", "<b>Image</b><br>drag a box, or click two corners")
                    c.sparse = _picture("sparse", "<b>Sparse</b><br>the tokens of the evidence")
                with gr.Row():
                    c.dense = _picture("dense", "<b>Dense</b><br>all tokens")
                    c.random = _picture("random", "<b>Random</b><br>as many tokens, anywhere")
                c.table = gr.HTML(elem_id="results")
                c.thoughts = gr.HTML(elem_id="thoughts")
        _connect(handlers, examples, c)
    return page


def _connect(handlers: Handlers, examples: Sequence[Example], c: SimpleNamespace) -> None:
    """Join the components `c` of the page to its events."""
    on = partial(gr.on, api_visibility="private")
    shows = [c.opened, c.preview, c.facts, c.part, c.centre, c.width, c.boxes]
    for button, example in zip(c.buttons, examples, strict=True):
        on(button.click, partial(_fill, example), None, [c.file, c.question, c.part])
        on(button.click, partial(handlers.open, str(example.image), example.part), None, shows)
    on([c.file.upload, c.file.clear], handlers.open, c.file, shows)
    on(c.part.submit, handlers.open, [c.file, c.part], shows)
    corners = [c.opened, c.boxes, c.drawn]
    on(c.preview.select, handlers.click, corners, corners, trigger_mode="multiple", show_progress="hidden")
    on(c.clear.click, handlers.clear, c.opened, [c.opened, c.boxes])
    on(c.take.click, lambda text: text, c.found, c.boxes)
    image = [c.opened, c.centre, c.width]
    changes = [c.centre.change, c.width.change, c.boxes.change, c.opened.change]
    drawing: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    on(changes, handlers.draw, [*image, c.boxes], c.preview, **drawing)
    shown = (c.dense, c.sparse, c.random)
    results = [*(heading for heading, _ in shown), *(picture for _, picture in shown), c.table, c.thoughts, c.found]
    one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    on(
        [c.ask.click, c.question.submit, c.boxes.submit, c.drawn.change], handlers.ask,
        [*image, c.question, c.plan, c.budget, c.boxes, c.seed], results, trigger_mode="always_last", **one_at_a_time,
    )  # fmt: skip
    asked = [*image, c.question, c.budget, c.boxes]
    on(c.ask_all.click, handlers.ask_all, asked, [c.table, c.thoughts], **one_at_a_time)


def _picture(name: str, heading: str) -> tuple[gr.HTML, gr.Image]:
    """A line and the picture below it; a label of the picture itself would hide pixels."""
    with gr.Column(min_width=220):
        above = gr.HTML(heading, elem_classes="heading", elem_id=f"{name}-heading")
        picture = gr.Image(
            show_label=False, interactive=False, format="png", height=PICTURE_HEIGHT, elem_id=name,
            buttons=[] if name == "preview" else ["fullscreen"], alt_text=f"{name}: nothing yet",
        )  # fmt: skip
    return above, picture


def _fill(example: Example) -> tuple[None, str, str]:
    """What an example fills in: no file, its question and its part."""
    return None, example.question, example.part


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
    block: bool = True,
    announce: Callable[[], None] = lambda: None,
) -> tuple[gr.Blocks, str]:
    """Serve the page; returns it and its address, with `block` only after it was stopped.

    Args:
        folder: folder for the pictures of the examples, such as a temporary one.
        data: record files whose questions are the examples; empty: phantoms are drawn.
        port: port of the page; None: a free one from 7860 on.
        announce: called when all arguments have been checked, before the page is served.

    Raises:
        DataError: from `record_examples`.
        OSError: if the port is taken.
    """
    examples = record_examples(data, folder) if data else draw_examples(folder)
    page = build(vlm, examples, model)
    if port is not None and _taken(host, port):
        raise OSError(f"port {port} of {host} cannot be used; choose another with --port")
    announce()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[str(folder)],
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


def _taken(host: str, port: int) -> bool:
    """Whether a port cannot be listened on: another program does, or the host is no address of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
