"""The events of the demo's page about answers: each gives new values for the components that it changes.

The server alone decides which picture is on the page: `Session` holds it, and no event writes it back. An event that
computed something for an earlier picture, window or question finds that the session has moved on, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vitos.core.geometry import Box
from vitos.core.masks import fit_budget
from vitos.core.sparsify import Kept, select
from vitos.policy.plans import Limits
from vitos.policy.plans.one_pass import best_of
from vitos.policy.vlm import SparseVLM
from vitos.serve.demo import figures, render
from vitos.serve.demo.compare import DRAWN, ComparedAnswer, Comparison, compare, compare_plans, plans_of
from vitos.serve.demo.examples import Example
from vitos.serve.demo.inputs import format_boxes, parse_boxes, readable_boxes
from vitos.serve.demo.link import PageView
from vitos.serve.demo.opening import HEADINGS, RESULTS, Opening, errors_on_page, no_answers, unchanged
from vitos.serve.demo.session import AskedPictures, Given, PageImage, Session, Subject


class Handlers(Opening):
    """The events of the page of one model.

    A method's docstring names the components whose new values it returns, in their order. "The answers" are three
    headings, three pictures, table, thoughts, figures and link.
    """

    def __init__(
        self,
        vlm: SparseVLM,
        folder: Path,
        limits: Limits = Limits(),
        examples: Sequence[Example] = (),
        model: str = "nano",
    ) -> None:
        super().__init__(folder, examples, model, plans_of(vlm)[0])
        self.vlm = vlm
        self.limits = limits

    def begin(self, session: Session, centre: float, width: float, question: str) -> tuple[Any, ...]:
        """Remember what the page asks about, and remove the answers: the answers."""
        with self.lock:
            session.subject = _subject(session.opened, centre, width, question)
            session.forget_answers()
        return no_answers()

    def change(self, session: Session, centre: float, width: float, question: str) -> tuple[Any, ...]:
        """Remove the answers if picture, window or question are no longer those that they are about: the answers."""
        if session.subject == _subject(session.opened, centre, width, question):
            return unchanged(RESULTS)
        with self.lock:
            session.subject = None
            session.forget_answers()
        return no_answers()

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
        draw: Sequence[str] = DRAWN,
    ) -> tuple[Any, ...]:
        """Compare dense, sparse and random: the answers.

        `begin` comes first. An answer to anything else than what the page asks about by then is not shown.
        """
        given = Given(
            centre=centre, width=width, question=question, plan=plan, budget=budget, boxes=boxes, seed=int(seed or 0),
            draw=draw,
        )  # fmt: skip
        return self._answered(session, given)

    def ask_all(
        self,
        session: Session,
        centre: float,
        width: float,
        question: str,
        budget: float,
        boxes: str,
        draw: Sequence[str] = DRAWN,
    ) -> tuple[Any, ...]:
        """Compare dense and all plans: the answers; as `ask`."""
        given = Given(centre=centre, width=width, question=question, budget=budget, boxes=boxes, draw=draw)
        return self._answered(session, given)

    def _answered(self, session: Session, given: Given) -> tuple[Any, ...]:
        opened = session.opened
        subject = _subject(opened, given.centre, given.width, given.question)
        with errors_on_page():
            if opened is None:
                raise ValueError("Choose an example or a file first.")
            asked = opened.asked(given.centre, given.width)
            boxes, notes = _placed(opened, asked, given.boxes)
            if session.subject != subject:
                return unchanged(RESULTS)
            options: dict[str, Any] = {
                "lead": asked.lead, "budget": given.budget, "boxes": boxes, "limits": self.limits,
            }  # fmt: skip
            if given.plan:
                found = compare(self.vlm, asked.paths, given.question, given.plan, seed=given.seed, **options)
            else:
                found = compare_plans(self.vlm, asked.paths, given.question, **options)
            found = replace(found, notes=(*notes, *found.notes))
            return self._shown(session, subject, asked, found, self.view_of(opened, given))
        return unchanged(RESULTS)

    def _shown(
        self, session: Session, subject: Subject | None, asked: AskedPictures, found: Comparison, view: PageView
    ) -> tuple[Any, ...]:
        """The answers, if they are still those that the page asks for."""
        with self.lock:
            if session.subject != subject:
                return unchanged(RESULTS)
            session.asked, session.compared, session.view = asked, found, view
            session.all_plans = not view.plan
        heads = [render.heading(one, view.question) for one in found][:3]
        if session.all_plans:  # there are no random tokens
            heads = [*heads[:2], HEADINGS["random"]]
        table, thoughts = render.results_table(found, view.question), render.thoughts(found, view.question)
        pictures = self.redraw(session, view.draw.split(","))
        if session.compared is not found:
            return unchanged(RESULTS)
        return *heads, *pictures[:3], table, thoughts, *pictures[3:]

    def redraw(self, session: Session, draw: Sequence[str]) -> tuple[Any, ...]:
        """Draw the answers on the shown picture: three pictures, figures and link."""
        found, view, place = session.compared, session.view, session.place()
        if found is None or view is None or session.opened is None:
            return unchanged(5)
        view = replace(view, picture=session.opened.shown + 1, draw=",".join(draw))
        if place is None:
            text = f"{session.opened.stack.word} {session.opened.number} was not asked about."
            return *(_picture(None, text),) * 3, f"<p>{escape(text)}</p>", link(view)
        large = found.answers[: 2 if session.all_plans else 3]
        pictures = [_picture(self.folder.save(one.picture(place, draw)), render.title(one)) for one in large]
        if session.all_plans:
            pictures.append(_picture(None, "random: nothing yet"))
            small = figures.cards(found, view.question, place, draw)
        else:
            small = figures.steps(found.answers[1], view.question, place, draw)
        if session.compared is found and session.place() == place:
            session.view = view
            return *pictures, small, link(view)
        self.folder.discard(*(picture["value"] for picture in pictures))
        return unchanged(5)

    def take(self, session: Session) -> str:
        """The model's boxes of the answer on the page, or those around what its head kept: boxes."""
        if session.compared is None or session.asked is None:
            return ""
        found = session.asked.numbered(session.compared.answers[1].finding.boxes)
        return format_boxes(found, session.opened is not None and session.opened.several)

    def slide(
        self,
        session: Session,
        centre: float,
        width: float,
        boxes: str,
        budget: float,
        draw: Sequence[str] = DRAWN,
    ) -> tuple[Any, ...]:
        """Show which tokens another budget would keep, without asking: heading and picture of the sparse answer."""
        opened, asked, found, place = session.opened, session.asked, session.compared, session.place()
        if opened is None or asked is None or found is None or place is None:
            return unchanged(2)
        with errors_on_page():
            answer = found.answers[1]
            kept = self._at_budget(answer, asked.placed(readable_boxes(boxes, opened.number)), budget)
            if kept is None:
                return unchanged(2)
            other = replace(answer, finding=replace(answer.finding, kept=kept))
            file = self.folder.save(other.picture(place, draw))
            if session.compared is found and session.place() == place:
                return f"<b>Sparse: {other.kept}</b><br>not asked yet", _picture(file, f"Sparse: {other.kept}")
            self.folder.discard(file)
        return unchanged(2)

    def _at_budget(self, answer: ComparedAnswer, boxes: Sequence[Box], budget: float) -> Kept | None:
        """The tokens that the answer's plan would keep at a budget; None: there is no evidence."""
        grid, scores = answer.finding.grid, answer.finding.kept.scores
        if scores is not None and not boxes:
            return best_of(self.vlm.spec, grid, scores, budget or None)
        evidence = boxes or answer.finding.boxes
        if not evidence:
            return None
        if budget:
            return Kept(grid, fit_budget(grid, evidence, max(1, round(budget * grid.num_tokens))))
        return select(grid, evidence, self.vlm.spec.keep)


def link(view: PageView) -> str:
    """HTML of the link to a view; the page's script also puts it into the address."""
    return f'<a id="link" href="{escape(view.query)}">Link to this view</a>'


def _picture(file: str | None, text: str) -> Any:
    return gr.update(value=file, alt_text=text)


def _placed(opened: PageImage, asked: AskedPictures, boxes: str) -> tuple[tuple[Box, ...], list[str]]:
    """The person's boxes in the pictures that are asked about, and a note if there are others.

    Raises:
        ValueError: for a line that is no box, or a box in a picture that is not there.
    """
    parsed = parse_boxes(boxes, opened.number)
    for number, box in enumerate(parsed, start=1):
        if box.image not in opened.stack.numbers:
            raise ValueError(f"Box {number} lies in picture {box.image}, which is not there.")
    given = asked.placed(parsed)
    left = len(parsed) - len(given)
    return given, [f"{left} of your boxes lie in pictures that were not asked about."] * bool(left)


def _subject(opened: PageImage | None, centre: float, width: float, question: str) -> Subject | None:
    """What an answer is about; None: there is no image."""
    if opened is None:
        return None
    return opened.opening, tuple(map(str, opened.asked(centre, width).paths)), question or ""
