"""The HTML page of every report: one file that needs nothing else, for reading, mailing and printing.

Model text, questions and file names are untrusted: the template escapes all of them, `report.js` writes them as text
only, and the page's content security policy allows that one script, by its hash, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from vitos.data.files import write_text_atomic
from vitos.reports.cases import CaseBlock
from vitos.reports.overlay import GOLD_COLOUR, PREDICTED_COLOUR
from vitos.reports.overview import BigNumber
from vitos.reports.table import Sheet

RESEARCH_ONLY = (
    "For research only. Not a medical device; not for diagnosis, treatment or any decision about a patient."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with a figure, a table or both below it; without either it is not shown.

    Attributes:
        title: the heading, by default the table's.
        note: a sentence above the figure.
        narrow: the same figure for a narrow page; None: the wide one shrinks.
        alt: what the figure shows, in words.
        text_last: the last column of the table is text, not numbers.
        level: level of the heading: 2, or 3 for a part of the section above.
        anchor: name of the section in the page's address; empty: the navigation does not list it.
    """

    title: str = ""
    note: str = ""
    figure: Figure | None = None
    narrow: Figure | None = None
    alt: str = ""
    sheet: Sheet | None = None
    text_last: bool = False
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An example on the first screen.

    Attributes:
        alt: what the image shows, in words.
        detail: what the model saw.
    """

    image: Image.Image
    alt: str
    question: str
    answer: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The first screen.

    Attributes:
        figures: the same figure for a wide and for a narrow page, or empty.
    """

    numbers: Sequence[BigNumber] = ()
    figures: Sequence[Figure] = ()
    picture: Picture | None = None


def write_page(
    out: Path,
    title: str,
    sections: Sequence[Section],
    *,
    summary: Sequence[str] = (),
    overview: Overview = Overview(),
    cases: CaseBlock | None = None,
    origin: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a report, whole or not at all.

    Args:
        summary: paragraphs in words.
        overview: the first screen.
        cases: all cases; None: the page shows none and holds no script.
        origin: name and value of what the figures come from, for the end of the page.
    """
    script = _resource("report.js") if cases else ""
    page = render(
        "report.html.j2",
        title=title,
        summary=summary,
        sections=[s for s in sections if s.figure or (s.sheet and s.sheet.rows)],
        overview=overview,
        cases=cases,
        # In a script element, no text may end the element.
        pictures=Markup(json.dumps(cases.pictures).replace("<", "\\u003c")) if cases else "",
        predicted_colour="#" + bytes(PREDICTED_COLOUR).hex(),
        gold_colour="#" + bytes(GOLD_COLOUR).hex(),
        origin=origin,
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        figure_uri=figure_uri,
        image_uri=image_uri,
    )
    write_text_atomic(out, page)


def _resource(name: str) -> str:
    return resources.files("vitos.reports").joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; in HTML every value is escaped, and a value that is missing is an error."""
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_resource(template)).render(research_only=RESEARCH_ONLY, **values)


def image_uri(image: Image.Image) -> str:
    """The image as a JPEG, in a data URI."""
    buffer = io.BytesIO()
    # Full colour resolution: the thin coloured lines are what the picture is for.
    image.save(buffer, "JPEG", quality=86, subsampling=0, optimize=True)
    return _uri("image/jpeg", buffer)


def figure_uri(figure: Figure) -> str:
    """The figure as an SVG, in a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _uri("image/svg+xml", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
