"""The events of the demo's page that open files, show one of their pictures and draw boxes on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from vitos.reports.overlay import PREDICTED_COLOUR, draw_overlay
from vitos.serve.demo import figures
from vitos.serve.demo.examples import Example
from vitos.serve.demo.files import PageFolder
from vitos.serve.demo.inputs import (
    Point,
    box_between,
    fitting,
    format_boxes,
    open_image,
    parse_boxes,
    readable_boxes,
    window_range,
)
from vitos.serve.demo.link import PageView, digest
from vitos.serve.demo.session import Given, PageImage, Session
from vitos.serve.demo.stack import open_stack

HEADINGS = {
    "dense": "<b>Dense</b><br>all tokens",
    "sparse": "<b>Sparse</b><br>the tokens of the evidence",
    "random": "<b>Random</b><br>as many tokens, anywhere",
}
"""The line above each answer's picture while there is no answer."""
RESULTS = 2 * len(HEADINGS) + 4
"""Number of components that show answers: headings, pictures, table, thoughts, figures and link."""
SHOWS = 11
"""Number of components that show opened pictures: preview, facts, heading, slider, axis, slices, centre, width, boxes,
and two numbers that ask when they change."""
THUMBNAILS = 9
"""Largest number of slices of which there are thumbnails; of images that are asked about together all have one."""


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show an error that a user can correct as one message on the page; what follows the block then runs.

    `gr.Error` would also mark each component that the event could have changed.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        gr.Warning(str(error), title="That did not work")


def unchanged(count: int) -> tuple[Any, ...]:
    """Values that leave `count` components as they are."""
    return (gr.skip(),) * count


def no_answers() -> tuple[Any, ...]:
    """Values that empty the components of the answers."""
    pictures = [gr.update(value=None, alt_text=f"{name}: nothing yet") for name in HEADINGS]
    return *HEADINGS.values(), *pictures, "", "", "", ""


def heading_of(opened: PageImage | None) -> str:
    """HTML above the preview; the page's script reads from it in which picture a new box lies."""
    if opened is None or not opened.several:
        return "<b>Image</b><br>drag a box, or click two corners"
    word, place, count = opened.stack.word, opened.shown + 1, len(opened.stack)
    return (
        f'<b data-number="{opened.number}" data-place="{place}">{word} {opened.number}</b> ({place} of {count})<br>'
        "drag a box, or click two corners"
    )


class Opening:
    """The events that decide which picture is on the page.

    A method's docstring names the components whose new values it returns, in their order. "What is shown" is preview,
    facts, heading, slider, axis, slices, centre, width, boxes, and two numbers: a change of the first one asks, one of
    the second asks by all plans.

    Attributes:
        folder: the files of the page.
        lock: held while a session is changed.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], model: str, plans: Sequence[str]) -> None:
        self.folder = PageFolder(folder)
        self.lock = Lock()
        self._model, self._plans = Path(model).name, plans  # a link must not show a folder
        self._examples = {digest(example.images): example for example in examples}

    # --- opening ----------------------------------------------------------------------------------------------------

    def open(self, session: Session, files: Sequence[str] | str | None) -> Iterator[tuple[Any, ...]]:
        """Show files: what is shown, then the answers.

        What belonged to the image before is removed first, while the files are still being read. If other files are
        opened meanwhile, nothing of these is shown.

        For a file that cannot be used, the reason is shown in place of its facts, and there is no image.
        """
        given = [Path(file) for file in ([files] if isinstance(files, str) else files or ())]
        with self.lock:
            for place, file in enumerate(given):
                if self.folder.is_upload(file):
                    given[place] = self.folder.without_name(file)
                    session.names[given[place]] = file.name
        yield from self._open(session, tuple(given))

    def open_example(self, session: Session, example: Example) -> Iterator[tuple[Any, ...]]:
        """Show an example: files, question, then as `open`."""
        session.wanted = None
        yield from self._open_example(session, example, example.question)

    def open_axis(self, session: Session, axis: Any) -> Iterator[tuple[Any, ...]]:
        """Cut the volume across another axis: as `open`."""
        yield from self._open(session, session.files, session.question, int(axis))

    def restore(self, session: Session, query: str) -> Iterator[tuple[Any, ...]]:
        """Show what a link names: plan, budget, seed, drawing, then as `open_example`, and ask.

        The image of an upload is not in a link; then all but the image is filled in until it is chosen.
        """
        fields, rest = unchanged(4), 2 + SHOWS + RESULTS
        with errors_on_page():
            view = PageView.from_query(query or "")
            if view is None:
                yield *fields, *unchanged(rest)
                return
            if view.plan and view.plan not in self._plans:
                raise ValueError(f"The link's plan {view.plan!r} is none that this model can follow.")
            if view.model and view.model != self._model:
                gr.Warning(f"This link was made with the model {view.model}, not {self._model}.")
            session.wanted = view
            draw = [part for part in view.draw.split(",") if part]
            fields = view.plan or gr.skip(), view.budget, view.seed, draw
            if example := self._examples.get(view.image):
                for values in self._open_example(session, example, view.question):
                    yield *fields, *values
                    fields = unchanged(4)
                return
            gr.Info("Choose the image of this link; it is asked about as soon as it is open.")
            yield *fields, gr.skip(), view.question, *unchanged(SHOWS + RESULTS)
            return
        yield *fields, *unchanged(rest)

    def _open_example(self, session: Session, example: Example, question: str) -> Iterator[tuple[Any, ...]]:
        filled: tuple[Any, ...] = (None, question)
        for values in self._open(session, example.images, example.question):
            yield *filled, *values
            filled = unchanged(2)

    def _open(
        self, session: Session, files: tuple[Path, ...], question: str = "", axis: int | None = None
    ) -> Iterator[tuple[Any, ...]]:
        with self.lock:
            session.names = {path: session.names.get(path, path.name) for path in files}
            session.opened, session.subject, session.files, session.question = None, None, files, question
            session.forget_answers()
            session.openings += 1
            opening = session.openings
        yield None, "Opening …" if files else "", heading_of(None), *unchanged(5), "", *unchanged(2), *no_answers()
        opened, shown = self._read(session, files, question, axis, opening)
        with self.lock:
            current = session.openings == opening
            if current:
                session.opened = opened
                if opened is not None:
                    session.wanted = None
        if not current:
            self.folder.discard(shown[0])
        yield (*(shown if current else unchanged(SHOWS)), *unchanged(RESULTS))

    def _read(
        self, session: Session, files: tuple[Path, ...], question: str, axis: int | None, opening: int
    ) -> tuple[PageImage | None, tuple[Any, ...]]:
        """The pictures of files, and new values for what is shown; as a link wants them, if it names these files."""
        hidden = gr.update(visible=False)
        if not files:
            return None, (None, "", heading_of(None), *(hidden,) * 5, "", *unchanged(2))
        try:
            mark, wanted = digest(files), session.wanted
            if wanted is not None and wanted.image != mark:
                gr.Warning("This is not the image of the link.")
                wanted = None
            if wanted is not None and wanted.axis:
                axis = int(wanted.axis)
            window = wanted.centre_and_width if wanted is not None else None
            stack = open_stack(files, question, axis)
            shown = stack.start if wanted is None else min(max(wanted.picture, 1), len(stack)) - 1
            rule = wanted.slices if wanted is not None else ""
            opened = PageImage(
                stack=stack, shown=shown, size=(1, 1), window=None, rule=rule, series=stack.choose(rule),
                opening=opening, digest=mark, linked=window,
            )  # fmt: skip
            boxes = wanted.boxes if wanted is not None else ""
            opened, (file, *others) = self._picture(opened, boxes, window)
        except (ValueError, OSError) as error:
            gone = f"cannot be read ({error.strerror}); choose it again" if isinstance(error, OSError) else str(error)
            why = _with_names(gone, session.names)
            gr.Warning(why, title="This file cannot be used")
            return None, (None, why, heading_of(None), *(hidden,) * 5, "", *unchanged(2))
        axes = gr.update(visible=stack.axis is not None, value=str(stack.axis))
        slices = gr.update(visible=bool(stack.source), value=rule)
        asks = unchanged(2)
        if wanted is not None:
            session.drawn += 1
            asks = (session.drawn, gr.skip()) if wanted.plan else (gr.skip(), session.drawn)
        facts, heading, slider, centre, width = others
        facts = "\n".join(filter(None, [_with_names(facts, session.names), stack.note]))
        return opened, (file, facts, heading, slider, axes, slices, centre, width, boxes, *asks)

    def _picture(
        self, opened: PageImage, boxes: str, window: tuple[float, float] | None
    ) -> tuple[PageImage, tuple[Any, ...]]:
        """The pictures with the shown one opened; new values for preview, facts, heading, slider, centre and width.

        Args:
            opened: the pictures, the window unknown.
            boxes: boxes to draw on it.
            window: window to show it in; None: its own.
        """
        whole, facts = open_image(opened.stack.paths[opened.shown])
        own = None if opened.stack.together and opened.several else window_range(facts)
        opened = replace(opened, window=own, size=draw_overlay(fitting(whole), None, None, ()).size, corner=None)
        centre = width = gr.update(visible=False)
        if own is not None:
            # A slider sends 0 when it comes into view, so its range must hold 0; `chosen_window` knows what it means.
            limits = ((min(own.low, 0), max(own.high, 0)), (0, own.widest))
            centre, width = (
                gr.update(visible=True, minimum=low, maximum=high, step=own.step, value=value)
                for (low, high), value in zip(limits, window or own.window, strict=True)
            )
            if window is not None:
                whole, _ = open_image(opened.name(*window))
        drawn = _marked(fitting(whole), opened, boxes)
        text = "\n".join([facts.summary(), *(f"Warning: {warning}" for warning in facts.warnings)])
        count = len(opened.stack)
        slider = gr.update(visible=count > 1, minimum=1, maximum=max(2, count), value=opened.shown + 1)
        return opened, (self.folder.save(drawn), text, heading_of(opened), slider, centre, width)

    def thumbnails(self, session: Session) -> str:
        """Small pictures to choose from: thumbnails."""
        opened = session.opened
        if opened is None or not opened.several:
            return ""
        stack = opened.stack
        if opened.series is not None:
            places = [number - 1 for number in opened.series.numbers]
        elif stack.together or len(stack) <= THUMBNAILS:
            places = list(range(len(stack)))
        else:
            places = [(2 * i + 1) * len(stack) // (2 * THUMBNAILS) for i in range(THUMBNAILS)]
        with errors_on_page():
            items = [(p + 1, f"{stack.word} {stack.numbers[p]}", open_image(stack.paths[p])[0]) for p in places]
            if session.opened is not None and session.opened.opening == opened.opening:
                return figures.thumbnails(items, opened.shown + 1)
        return ""

    # --- which picture ----------------------------------------------------------------------------------------------

    def show(self, session: Session, place: float, centre: float, width: float, boxes: str) -> tuple[Any, ...]:
        """Show another picture: preview, facts, heading, centre, width.

        The window stays if the sliders show another than the file's own.
        """
        opened = session.opened
        if opened is None:
            return unchanged(5)
        with errors_on_page():
            turned = replace(opened, shown=min(max(int(place or 1), 1), len(opened.stack)) - 1)
            turned, (file, facts, heading, _, *sliders) = self._picture(
                turned, boxes, opened.chosen_window(centre, width)
            )
            with self.lock:
                current = session.opened is not None and session.opened.opening == opened.opening
                if current:
                    session.opened = turned
            if current:
                return file, _with_names(facts, session.names), heading, *sliders
            self.folder.discard(file)
        return unchanged(5)

    def choose(self, session: Session, rule: str) -> Any:
        """Ask about the slices of a rule: slider, on one of them."""
        opened = session.opened
        with errors_on_page():
            if opened is None:
                return gr.skip()
            series = opened.stack.choose(rule or "")
            with self.lock:
                if session.opened is not None and session.opened.opening == opened.opening:
                    session.opened = replace(session.opened, rule=(rule or "").strip(), series=series)
            if series is not None and opened.number not in series.numbers:
                return series.numbers[len(series.numbers) // 2]
        return gr.skip()

    # --- preview and boxes ------------------------------------------------------------------------------------------

    def draw(self, session: Session, centre: float, width: float, boxes: str) -> Any:
        """The preview in its window, with the boxes and the corner that was clicked."""
        opened = session.opened
        if opened is None:
            return gr.skip()
        with errors_on_page():
            picture, _ = open_image(opened.name(centre, width))
            file = self.folder.save(_marked(fitting(picture), opened, boxes))
            now = session.opened
            if now is not None and (now.opening, now.shown) == (opened.opening, opened.shown):
                return file
            self.folder.discard(file)
        return gr.skip()

    def click(self, session: Session, boxes: str, event: gr.SelectData) -> tuple[Any, ...]:
        """Set the first or second corner of a box: boxes, number of boxes drawn so far."""
        with errors_on_page(), self.lock:
            opened = session.opened
            if opened is None:
                return unchanged(2)
            x, y = event.index[0] / opened.size[0], event.index[1] / opened.size[1]
            if opened.corner is None:
                # Skip instead of returning `boxes`: the first click of a drag must not overwrite what the second
                # writes.
                session.opened = replace(opened, corner=(x, y))
                return unchanged(2)
            added = (*parse_boxes(boxes, opened.number), box_between(opened.corner, (x, y), opened.number))
            session.opened = replace(opened, corner=None)
            session.drawn += 1
            return format_boxes(added, opened.several), session.drawn
        return unchanged(2)

    def clear(self, session: Session) -> str:
        """Remove the boxes and the corner: boxes."""
        with self.lock:
            if session.opened is not None:
                session.opened = replace(session.opened, corner=None)
        return ""

    def view_of(self, opened: PageImage, given: Given) -> PageView:
        """What a link must name so that the page shows this again."""
        window = opened.chosen_window(given.centre, given.width)
        return PageView(
            image=opened.digest,
            question=given.question,
            model=self._model,
            plan=given.plan,
            budget=given.budget,
            boxes=given.boxes or "",
            seed=given.seed,
            picture=opened.shown + 1,
            axis="" if opened.stack.axis is None else str(opened.stack.axis),
            slices=opened.rule,
            window=f"{window[0]:g},{window[1]:g}" if window else "",
            draw=",".join(given.draw),
        )


def _marked(picture: Image.Image, opened: PageImage, boxes: str) -> Image.Image:
    """The picture with its boxes, and a cross at the corner."""
    own = [box for box in readable_boxes(boxes, opened.number) if box.image == opened.number or not opened.several]
    drawn = draw_overlay(picture, None, None, own)
    if opened.corner is not None:
        _cross(drawn, opened.corner)
    return drawn


def _cross(picture: Image.Image, corner: Point) -> None:
    x, y = (v * side for v, side in zip(corner, picture.size, strict=True))
    arm, pen = max(picture.size) / 40, ImageDraw.Draw(picture)
    for colour, line in (((0, 0, 0), 5), (PREDICTED_COLOUR, 3)):
        pen.line((x - arm, y, x + arm, y), colour, line)
        pen.line((x, y - arm, x, y + arm), colour, line)


def _with_names(text: str, names: dict[Path, str]) -> str:
    """A message with the names that the files had where they came from."""
    for path, name in names.items():
        text = text.replace(path.name, name)
    return text
