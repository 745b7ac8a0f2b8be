"""Small pictures as HTML: the steps of an answer, all plans, and the pictures of a question. They hold their pixels
themselves, so no file has to be served for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable
from html import escape

from PIL import Image

from vitos.policy.plans import get_plan
from vitos.policy.types import tokens_written
from vitos.serve.demo.compare import BOXES, DRAWN, SCORES, ComparedAnswer, Comparison
from vitos.serve.demo.render import answer_text

SIDE, THUMB = 320, 56
"""Longest side in pixels of a small picture, and of a thumbnail."""


def steps(answer: ComparedAnswer, question: str, place: int, draw: Collection[str] = DRAWN) -> str:
    """HTML of the steps of an answer, each with its picture and milliseconds: localize, keep, reason."""
    encode, localize, keep, reason = answer.seconds
    located, last = _located(answer), f"→ {answer_text(answer, question)}"
    written = tokens_written(answer.finding.tokens) - answer.finding.tokens.get("localize_decode", 0)
    items = [
        _figure(
            answer.picture(place, (BOXES, SCORES), cells=False), "1. Localize", f"{1000 * localize:.1f} ms", located
        ),
        _figure(answer.picture(place, draw), "2. Keep", f"{1000 * keep:.1f} ms", _kept(answer)),
        _figure(answer.picture(place, ()), "3. Reason", f"{1000 * reason:.1f} ms", last, f"{written} tokens written"),
    ]
    return _list(f"{answer.title}, step by step; before it, {1000 * encode:.1f} ms encode the image", items)


def _located(answer: ComparedAnswer) -> str:
    """How the evidence was found, in a few words."""
    finding, count = answer.finding, len(answer.boxes)
    if answer.given:
        return "your boxes; nothing is localized"
    if finding.kept.scores is not None:
        return "scores of the evidence head"
    if get_plan(finding.plan).localizes:
        written = finding.tokens.get("localize_decode", 0)
        return f"{count} {'box' if count == 1 else 'boxes'}, {written} tokens written"
    return "nothing is localized"


def cards(comparison: Comparison, question: str, place: int, draw: Collection[str] = DRAWN) -> str:
    """HTML of a small picture per answer with its tokens, milliseconds and answer."""
    items = []
    for answer in comparison:
        time, said = f"{1000 * sum(answer.seconds):.0f} ms", f"→ {answer_text(answer, question)}"
        items.append(_figure(answer.picture(place, draw), answer.title, time, _kept(answer), said))
    return _list("All plans", items)


def thumbnails(pictures: Iterable[tuple[int, str, Image.Image]], shown: int) -> str:
    """HTML of buttons that show a picture each.

    Args:
        pictures: place from 1, name and image of each.
        shown: place of the one that is shown.
    """
    buttons = "".join(
        f'<button type="button" class="thumb" data-place="{place}" aria-pressed="{str(place == shown).lower()}">'
        f'<img alt="" src="{_source(picture, THUMB)}"><span>{escape(name)}</span></button>'
        for place, name, picture in pictures
    )
    return f'<div class="thumbs" role="group" aria-label="Pictures">{buttons}</div>' if buttons else ""


def _kept(answer: ComparedAnswer) -> str:
    return answer.kept + ("; fell back" if answer.finding.fallback else "")


def _figure(picture: Image.Image, name: str, time: str, *texts: str) -> str:
    caption = "<br>".join([f"<b>{escape(name)}</b> <span>{escape(time)}</span>", *map(escape, texts)])
    source = _source(picture, SIDE)
    return f'<li><figure><img alt="{escape(name)}" src="{source}"><figcaption>{caption}</figcaption></figure></li>'


def _list(title: str, items: list[str]) -> str:
    return f'<div class="figures"><p><b>{escape(title)}</b></p><ol>{"".join(items)}</ol></div>'


def _source(picture: Image.Image, side: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
