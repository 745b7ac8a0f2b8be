"""What one browser tab shows: the pictures that were opened, what was asked about them, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitos.core.geometry import Box
from vitos.data.series import Series
from vitos.serve.demo.compare import DRAWN, Comparison
from vitos.serve.demo.inputs import Point, WindowRange, windowed
from vitos.serve.demo.link import PageView
from vitos.serve.demo.stack import PictureStack


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPictures:
    """The pictures that a question is about.

    Attributes:
        paths: their names, with windows.
        numbers: the number of each, as boxes on the page name it.
        lead: text in front of the question; see `Scan`.
    """

    paths: tuple[Path, ...]
    numbers: tuple[int, ...]
    lead: str = ""

    def placed(self, boxes: Sequence[Box]) -> tuple[Box, ...]:
        """Those boxes that lie in these pictures, with `Box.image` the place among them."""
        return tuple(
            replace(box, image=self.numbers.index(box.image) + 1) for box in boxes if box.image in self.numbers
        )

    def numbered(self, boxes: Sequence[Box]) -> tuple[Box, ...]:
        """The inverse: boxes of an answer, with `Box.image` the number of the picture."""
        return tuple(replace(box, image=self.numbers[box.image - 1]) for box in boxes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageImage:
    """The pictures on the page, one of which is shown.

    Attributes:
        stack: the pictures.
        shown: place of the shown one, from 0.
        size: width and height of its preview in pixels, the unit of clicks.
        window: range of the sliders; None: the picture has no window.
        rule: which slices are asked about, as it was written; empty: the shown one.
        series: these slices.
        corner: first corner of a box that is being drawn, in fractions.
        opening: number of the opening within the session; the same file opened again gets another one.
        digest: digest of the files, by which a link names them.
        linked: window of the link that opened it, if it names one.
    """

    stack: PictureStack
    shown: int = 0
    size: tuple[int, int]
    window: WindowRange | None
    rule: str = ""
    series: Series | None = None
    corner: Point | None = None
    opening: int = 0
    digest: str = ""
    linked: tuple[float, float] | None = None

    @property
    def number(self) -> int:
        """The number of the shown picture."""
        return self.stack.numbers[self.shown]

    @property
    def several(self) -> bool:
        """Whether there are several pictures, so that boxes must say in which one they lie."""
        return len(self.stack) > 1

    def chosen_window(self, centre: float | None, width: float | None) -> tuple[float, float] | None:
        """The window of the sliders; None: the file's own.

        A width of 0 stands for the window in which the picture was opened: sliders have it until the browser shows
        them.
        """
        if self.window is None or centre is None or width is None:
            return None
        if width == 0:
            return self.linked
        return self.window.chosen(centre, width)

    def name(self, centre: float | None, width: float | None) -> Path:
        """The shown picture, with a window if the sliders show another than the file's own."""
        return windowed(self.stack.paths[self.shown], self.chosen_window(centre, width))

    def asked(self, centre: float | None, width: float | None) -> AskedPictures:
        """The pictures that the question is about, as `name`."""
        window = self.chosen_window(centre, width)
        if self.series is not None:
            numbers, paths = self.series.numbers, self.series.paths
            if window is not None:
                paths = tuple(windowed(self.stack.paths[number - 1], window) for number in numbers)
            return AskedPictures(paths=paths, numbers=numbers, lead=self.series.lead)
        if self.stack.together:
            paths = tuple(windowed(path, window) for path in self.stack.paths)
            return AskedPictures(paths=paths, numbers=self.stack.numbers)
        return AskedPictures(paths=(self.name(centre, width),), numbers=(self.number,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a person gave besides the pictures, as the page's components hold it.

    Attributes:
        centre, width: of the window.
        question: the question with its options.
        plan: name of the plan; empty for all plans.
        budget: share of the tokens, 0..1; 0 for none.
        boxes: one a line (`parse_boxes`).
        seed: of the random tokens.
        draw: what is drawn on the pictures.
    """

    centre: float
    width: float
    question: str
    plan: str = ""
    budget: float = 0.0
    boxes: str = ""
    seed: int = 0
    draw: Sequence[str] = DRAWN


Subject = tuple[int, tuple[str, ...], str]
"""What an answer is about: the number of the opening, the pictures with frame and window, and the question."""


@dataclass(slots=True)
class Session:
    """What one browser tab shows now. `Handlers` changes it in place, under its lock.

    Attributes:
        opened: pictures on the page; None: there are none, or they are still being read.
        files: paths of the last files, even if they could not be opened; another axis opens them again.
        names: name of each of these files where it came from.
        question: the question that came with an example; empty for uploads.
        openings: number of openings so far.
        drawn: number of boxes drawn and links opened so far; each of them asks.
        subject: what the page now asks about; only answers about it are shown.
        asked: the pictures that the answers are about.
        compared: the answers on the page; None: there are none.
        all_plans: whether these are those of all plans.
        view: the view of these answers, for the link.
        wanted: the view of a link whose image has not been opened yet.
    """

    opened: PageImage | None = None
    files: tuple[Path, ...] = ()
    names: dict[Path, str] = field(default_factory=dict)
    question: str = ""
    openings: int = 0
    drawn: int = 0
    subject: Subject | None = None
    asked: AskedPictures | None = None
    compared: Comparison | None = None
    all_plans: bool = False
    view: PageView | None = None
    wanted: PageView | None = None

    def forget_answers(self) -> None:
        """Remove the answers."""
        self.asked, self.compared, self.view, self.all_plans = None, None, None, False

    def place(self) -> int | None:
        """Place of the shown picture among those of the answers, from 1; None: it was not asked about."""
        if self.opened is None or self.asked is None or self.opened.number not in self.asked.numbers:
            return None
        return self.asked.numbers.index(self.opened.number) + 1
