"""A link that reproduces a view: all that was given for an answer, but the image by its digest only.

The address of a page must not hold an image, nor a name that lets others fetch an upload. So an example is found by
its digest; an upload has to be chosen again, and is recognized.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from vitos.data.picture import split_name
from vitos.serve.demo.compare import DRAWN
from vitos.serve.demo.inputs import MAX_QUESTION, parse_boxes

LONGEST = 4 * MAX_QUESTION
"""Longest value of a parameter in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageView:
    """What is on the page.

    >>> PageView(image="0a1b", question="Left or right?", budget=0.25).query
    '?image=0a1b&question=Left+or+right%3F&budget=0.25'
    >>> PageView.from_query("?image=0a1b&question=Left+or+right%3F&budget=0.25").budget
    0.25

    Attributes:
        image: digest of the image files (`digest`).
        question: the question with its options.
        model: name of the checkpoint.
        plan: name of the plan; empty for all plans.
        budget: share of the tokens, 0..1.
        boxes: the person's boxes, one a line.
        seed: seed of the random tokens.
        picture: place of the shown picture, from 1.
        axis: axis across which a volume is cut; empty for its last one.
        slices: rule by which slices are asked about; empty for the shown one.
        window: centre and width, "40,400"; empty for the file's own.
        draw: what is drawn on the pictures, joined by commas.
    """

    image: str
    question: str = ""
    model: str = ""
    plan: str = ""
    budget: float = 0.0
    boxes: str = ""
    seed: int = 0
    picture: int = 1
    axis: str = ""
    slices: str = ""
    window: str = ""
    draw: str = ",".join(DRAWN)

    @property
    def query(self) -> str:
        """The part of the address from the question mark on, without what has its default value."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return "?" + urlencode({name: value for name, value in values.items() if value != _DEFAULTS[name]})

    @property
    def centre_and_width(self) -> tuple[float, float] | None:
        """The window."""
        if not self.window:
            return None
        centre, width = map(float, self.window.split(","))
        return centre, width

    @classmethod
    def from_query(cls, query: str) -> PageView | None:
        """The view of an address; None for one that names no image. Unknown parameters are left out.

        Raises:
            ValueError: for a value that is not allowed; the message names it.
        """
        given = {
            name: value for name, value in parse_qsl(query.lstrip("?"), keep_blank_values=True) if name in _DEFAULTS
        }
        if not given.get("image"):
            return None
        for name, value in given.items():
            if len(value) > LONGEST:
                raise ValueError(f"The link's {name} is too long; ask again for a link.")
        view = cls(**{name: _read(name, value) for name, value in given.items()})
        parse_boxes(view.boxes)
        return view


_DEFAULTS = {one.name: one.default for one in fields(PageView)}


def _read(name: str, value: str) -> Any:
    try:
        if name == "window":
            centre, width = map(float, value.split(","))
            good = math.isfinite(centre) and math.isfinite(width)
        elif name == "budget":
            good = 0 <= float(value) <= 1
        elif name in ("seed", "picture"):
            good = int(value) >= 0
        else:
            good = name != "axis" or value in ("0", "1", "2")
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"The link's {name} is {value[:40]!r}, which cannot be read; ask again for a link.")
    kind = type(_DEFAULTS[name])
    return kind(value) if kind in (int, float) else value


def digest(names: Sequence[Path]) -> str:
    """Digest of the files of some pictures, in any order, and of their selectors: 16 hexadecimal digits."""
    parts = []
    for name in names:
        file, selector = split_name(name)
        with file.open("rb") as opened:
            parts.append(hashlib.file_digest(opened, "sha256").hexdigest() + selector)
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]
