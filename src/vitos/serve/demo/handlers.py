"""The events of the demo's page: each gives new values for the components that it changes.

The server alone decides which picture is on the page: `Session` holds it, and no event writes it back. An event that
computed something for an earlier picture, window or question finds that the session has moved on, and changes nothing.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from vitos.core.geometry import TokenGrid
from vitos.core.masks import fit_budget
from vitos.core.sparsify import Kept, select
from vitos.policy.plans import Limits
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import PREDICTED_COLOUR, draw_overlay
from vitos.serve.demo import render
from vitos.serve.demo.compare import compare, compare_plans
from vitos.serve.demo.inputs import (
    Example,
    Point,
    WindowRange,
    box_between,
    file_ending,
    fitting,
    format_boxes,
    image_name,
    may_have_parts,
    open_image,
    parse_boxes,
    readable_boxes,
    window_range,
)

CACHE_SECONDS = 3600
"""Age at which uploads and pictures are deleted; when the demo stops, all of them are."""
HEADINGS = {
    "dense": "<b>Dense</b><br>all tokens",
    "sparse": "<b>Sparse</b><br>the tokens of the evidence",
    "random": "<b>Random</b><br>as many tokens, anywhere",
}
"""The line above each answer's picture while there is no answer."""
RESULTS = 2 * len(HEADINGS) + 2
"""Number of components that show answers: headings, pictures, table and thoughts."""
SHOWS = 6
"""Number of components that show an opened file: preview, facts, part, centre, width and boxes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageImage:
    """The image on the page.

    Attributes:
        file: path of the file, without selector.
        size: width and height of its preview in pixels, the unit of clicks.
        window: range of the sliders; None: the image has no window.
        part: frame or slice of the file, as a selector.
        corner: first corner of a box that is being drawn, in fractions.
        opening: number of the opening within the session; the same file opened again gets another one.
    """

    file: str
    size: tuple[int, int]
    window: WindowRange | None
    part: str = ""
    corner: Point | None = None
    opening: int = 0

    def name(self, centre: float | None, width: float | None) -> Path:
        """The file with its selector, and a window if the sliders show another than the file's own."""
        if self.window is None or centre is None or width is None:
            return image_name(self.file, self.part)
        return image_name(self.file, self.part, self.window.chosen(centre, width))


Subject = tuple[int, str, str]
"""What an answer is about: the number of the opening, the image with frame and window, and the question."""


@dataclass(slots=True)
class Session:
    """What one browser tab shows now. `Handlers` changes it in place, under its lock.

    Attributes:
        opened: image on the page; None: there is none, or it is still being read.
        file: path of the last file, even if it could not be opened; naming a frame opens it again.
        name: name of that file where it came from.
        openings: number of openings so far.
        subject: what the page now asks about; only answers about it are shown.
        found: boxes of the sparse answer on the page, as text.
        grid: visual tokens of that answer's image; None: there is no answer.
    """

    opened: PageImage | None = None
    file: str | None = None
    name: str = ""
    openings: int = 0
    subject: Subject | None = None
    found: str = ""
    grid: TokenGrid | None = None


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
    """Values that empty the components of the answers: three headings, three pictures, table, thoughts."""
    pictures = [gr.update(value=None, alt_text=f"{name}: nothing yet") for name in HEADINGS]
    return *HEADINGS.values(), *pictures, "", ""


class Handlers:
    """The events of the page of one model.

    A method's docstring names the components whose new values it returns, in their order.

    Attributes:
        folder: existing folder for the pictures of the page, each in a file of its own.
    """

    def __init__(self, vlm: SparseVLM, folder: Path, limits: Limits = Limits()) -> None:
        self.vlm = vlm
        self.folder = folder
        self.limits = limits
        self._lock = Lock()

    # --- opening ----------------------------------------------------------------------------------------------------

    def open(self, session: Session, file: str | None, part: str = "") -> Iterator[tuple[Any, ...]]:
        """Show a file: preview, facts, part, centre, width, boxes, then the answers.

        What belonged to the image before is removed first, while the file is still being read. If another file is
        opened meanwhile, nothing of this one is shown.

        For a file that cannot be used, the reason is shown in place of its facts, and there is no image; the field for
        a frame stays, since naming one may be the remedy.
        """
        with self._lock:
            if file and self._is_upload(file):
                session.name = Path(file).name
                file = self._without_name(file)
            elif file != session.file:
                session.name = Path(file).name if file else ""
            session.opened, session.subject, session.found, session.file = None, None, "", file
            session.grid = None
            session.openings += 1
            opening, name = session.openings, session.name
        yield None, "Opening …" if file else "", *unchanged(3), "", *no_answers()
        opened, shown = self._read(file, name, part, opening)
        with self._lock:
            current = session.openings == opening
            if current:
                session.opened = opened
        if not current:
            self._discard(shown[0])
        yield (*(shown if current else unchanged(SHOWS)), *unchanged(RESULTS))

    def open_example(self, session: Session, example: Example) -> Iterator[tuple[Any, ...]]:
        """Show an example: file, question, then as `open`."""
        filled: tuple[Any, ...] = (None, example.question)
        for values in self.open(session, str(example.image), example.part):
            yield *filled, *values
            filled = unchanged(2)

    def open_part(self, session: Session, part: str) -> Iterator[tuple[Any, ...]]:
        """Show another frame or slice of the last file: as `open`."""
        yield from self.open(session, session.file, part)

    def _read(self, file: str | None, name: str, part: str, opening: int) -> tuple[PageImage | None, tuple[Any, ...]]:
        """The image of a file, and new values for preview, facts, part, centre, width, boxes; `name` is for errors."""
        hidden = gr.update(visible=False)
        if not file:
            return None, (None, "", gr.update(visible=False, value=""), hidden, hidden, "")
        parts = gr.update(visible=may_have_parts(file), value=part)
        try:
            picture, facts = open_image(image_name(file, part))
        except ValueError as error:
            why = str(error).replace(Path(file).name, name)
            gr.Warning(why, title="This file cannot be used")
            return None, (None, why, parts, hidden, hidden, "")
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
        opened = PageImage(file=str(file), size=drawn.size, window=own, part=part, opening=opening)
        return opened, (self._save(drawn), text, parts, *sliders, "")

    # --- preview and boxes ------------------------------------------------------------------------------------------

    def draw(self, session: Session, centre: float, width: float, boxes: str) -> Any:
        """The preview in its window, with the boxes and the corner that was clicked."""
        opened = session.opened
        if opened is None:
            return gr.skip()
        with errors_on_page():
            picture, _ = open_image(opened.name(centre, width))
            file = self._save(_marked(fitting(picture), opened.corner, boxes))
            if session.openings == opened.opening:
                return file
            self._discard(file)
        return gr.skip()

    def click(self, session: Session, boxes: str, drawn: int, event: gr.SelectData) -> tuple[Any, ...]:
        """Set the first or second corner of a box: boxes, number of boxes drawn so far."""
        with errors_on_page(), self._lock:
            opened = session.opened
            if opened is None:
                return unchanged(2)
            x, y = event.index[0] / opened.size[0], event.index[1] / opened.size[1]
            if opened.corner is None:
                # Skip instead of returning `boxes`: the first click of a drag must not overwrite what the second
                # writes.
                session.opened = replace(opened, corner=(x, y))
                return unchanged(2)
            added = (*parse_boxes(boxes), box_between(opened.corner, (x, y)))
            session.opened = replace(opened, corner=None)
            return format_boxes(added), drawn + 1
        return unchanged(2)

    def clear(self, session: Session) -> str:
        """Remove the boxes and the corner: boxes."""
        with self._lock:
            if session.opened is not None:
                session.opened = replace(session.opened, corner=None)
        return ""

    def take(self, session: Session) -> str:
        """The model's boxes of the answer on the page: boxes."""
        return session.found

    # --- answers ----------------------------------------------------------------------------------------------------

    def begin(self, session: Session, centre: float, width: float, question: str) -> tuple[Any, ...]:
        """Remember what the page asks about, and remove the answers: the answers."""
        with self._lock:
            session.subject, session.found = _subject(session.opened, centre, width, question), ""
            session.grid = None
        return no_answers()

    def change(self, session: Session, centre: float, width: float, question: str) -> tuple[Any, ...]:
        """Remove the answers if window or question are no longer those that they are about: the answers."""
        subject = _subject(session.opened, centre, width, question)
        return unchanged(RESULTS) if session.subject == subject else self.begin(session, centre, width, question)

    def ask(
        self,
        session: Session,
        centre: float,
        width: float,
        question: str,
        plan: Any,
        budget: float,
        boxes: str,
        seed: float,
    ) -> tuple[Any, ...]:
        """Compare dense, sparse and random: three headings, three pictures, table, thoughts.

        `begin` comes first. An answer to anything else than what the page asks about by then is not shown.
        """
        opened = session.opened
        subject = _subject(opened, centre, width, question)
        with errors_on_page():
            name, given = _name(opened, centre, width), parse_boxes(boxes)
            if session.subject != subject:
                return unchanged(RESULTS)
            compared = compare(
                self.vlm, name, question, plan, budget=budget, boxes=given, seed=int(seed or 0), limits=self.limits
            )
            headings = [render.heading(answer, question) for answer in compared]
            files = [self._save(answer.picture) for answer in compared]
            table, thoughts = render.results_table(compared, question), render.thoughts(compared, question)
            with self._lock:
                current = session.subject == subject
                if current:
                    sparse = compared.answers[1].finding
                    session.found, session.grid = format_boxes(sparse.boxes), sparse.grid
            if current:
                alts = map(render.title, compared)
                pictures = [gr.update(value=file, alt_text=alt) for file, alt in zip(files, alts, strict=True)]
                return *headings, *pictures, table, thoughts
            self._discard(*files)
        return unchanged(RESULTS)

    def ask_all(
        self, session: Session, centre: float, width: float, question: str, budget: float, boxes: str
    ) -> tuple[Any, ...]:
        """Compare dense and all plans: table and thoughts; as `ask`."""
        opened = session.opened
        subject = _subject(opened, centre, width, question)
        with errors_on_page():
            name, given = _name(opened, centre, width), parse_boxes(boxes)
            if session.subject != subject:
                return unchanged(2)
            compared = compare_plans(self.vlm, name, question, budget=budget, boxes=given, limits=self.limits)
            if session.subject == subject:
                return render.results_table(compared, question), render.thoughts(compared, question)
        return unchanged(2)

    def slide(self, session: Session, centre: float, width: float, boxes: str, budget: float) -> tuple[Any, ...]:
        """Show which tokens another budget would keep, without asking: heading and picture of the sparse answer."""
        opened, grid, evidence = session.opened, session.grid, readable_boxes(boxes) or readable_boxes(session.found)
        if opened is None or grid is None or not evidence:
            return unchanged(2)
        with errors_on_page():
            picture, _ = open_image(opened.name(centre, width))
            count = max(1, round(budget * grid.num_tokens))
            kept = (
                Kept(grid, fit_budget(grid, evidence, count)) if budget else select(grid, evidence, self.vlm.spec.keep)
            )
            file = self._save(draw_overlay(fitting(picture), grid, kept.mask, evidence))
            if session.grid is grid:
                text = f"{kept.count} of {grid.num_tokens} tokens ({kept.ratio:.0%})"
                return f"<b>Sparse: {text}</b><br>not asked yet", gr.update(
                    value=file, alt_text=f"Sparse: {text}, not asked"
                )
            self._discard(file)
        return unchanged(2)

    # --- files ------------------------------------------------------------------------------------------------------

    def _save(self, picture: Image.Image) -> str:
        """Write a picture to a new PNG file, which appears under its name when it is complete; its path."""
        self._delete_old()
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG")
        final = name.removesuffix(".part") + ".png"
        os.replace(name, final)
        return final

    def _is_upload(self, file: str) -> bool:
        """Whether a file lies where Gradio put it: in a folder of its own within ours."""
        return Path(file).is_relative_to(self.folder) and Path(file).parent != self.folder

    def _without_name(self, file: str) -> str:
        """Move an upload to a name that does not say who a patient is; its new path."""
        path = Path(file)
        moved = self.folder / f"upload-{secrets.token_hex(8)}{file_ending(path)}"
        os.replace(path, moved)
        with suppress(OSError):  # the same file is being uploaded again
            path.parent.rmdir()
        return str(moved)

    def _delete_old(self) -> None:
        """Delete pictures and uploads that are too old; Gradio does not know of all of them."""
        for file in filter(Path.is_file, self.folder.glob("*")):
            with suppress(FileNotFoundError):  # deleted by another thread
                if time.time() - file.stat().st_mtime > CACHE_SECONDS:
                    file.unlink()

    def _discard(self, *files: str | None) -> None:
        """Delete pictures that are not shown."""
        for file in files:
            if file is not None:
                Path(file).unlink(missing_ok=True)


def _marked(picture: Image.Image, corner: Point | None, boxes: str) -> Image.Image:
    """The picture with the boxes, and a cross at the corner."""
    drawn = draw_overlay(picture, None, None, readable_boxes(boxes))
    if corner is not None:
        x, y = (v * side for v, side in zip(corner, drawn.size, strict=True))
        arm, pen = max(drawn.size) / 40, ImageDraw.Draw(drawn)
        for colour, line in (((0, 0, 0), 5), (PREDICTED_COLOUR, 3)):
            pen.line((x - arm, y, x + arm, y), colour, line)
            pen.line((x, y - arm, x, y + arm), colour, line)
    return drawn


def _subject(opened: PageImage | None, centre: float, width: float, question: str) -> Subject | None:
    """What an answer is about; None: there is no image."""
    return None if opened is None else (opened.opening, str(opened.name(centre, width)), question or "")


def _name(opened: PageImage | None, centre: float, width: float) -> Path:
    if opened is None:
        raise ValueError("Choose an example or a file first.")
    return opened.name(centre, width)
