"""The HTML page of every report: one file that needs nothing else, for reading, mailing and printing.

Model text, questions and file names are untrusted: the template escapes all of them, and the page's content security
policy forbids scripts and everything from outside.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from vitos.data.files import write_text_atomic
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
        alt: what the figure shows, in words.
        scaled: the figure is shown at 100 CSS pixels per inch; otherwise as wide as it has pixels.
        text_last: the last column of the table is text, not numbers.
        level: level of the heading: 2, or 3 for a part of the section above.
    """

    title: str = ""
    note: str = ""
    figure: Figure | None = None
    alt: str = ""
    scaled: bool = True
    sheet: Sheet | None = None
    text_last: bool = False
    level: int = 2


def write_page(
    out: Path,
    title: str,
    sections: Sequence[Section],
    *,
    summary: Sequence[str] = (),
    cases: Mapping[str, Any] | None = None,
    origin: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a report, whole or not at all.

    Args:
        summary: paragraphs at the top.
        cases: see `vitos.reports.html`; None: the page shows none.
        origin: name and value of what the figures come from, for the end of the page.
    """
    page = render(
        "report.html.j2",
        title=title,
        summary=summary,
        sections=[s for s in sections if s.figure or (s.sheet and s.sheet.rows)],
        cases=cases,
        origin=origin,
        figure_uri=figure_uri,
    )
    write_text_atomic(out, page)


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; in HTML every value is escaped, and a value that is missing is an error."""
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    source = resources.files("vitos.reports").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(research_only=RESEARCH_ONLY, **values)


def image_uri(image: Image.Image) -> str:
    """The image as a JPEG, in a data URI."""
    buffer = io.BytesIO()
    # Full colour resolution: the thin coloured lines are what the picture is for.
    image.save(buffer, "JPEG", quality=86, subsampling=0, optimize=True)
    return _uri("image/jpeg", buffer)


def figure_uri(figure: Figure) -> str:
    """The figure as a PNG, in a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, transparent=True)
    return _uri("image/png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
