"""Selectors ranked at each budget, from the stored answers of one or several benches.

Models of a folder are shown one by one, or as the seeds of one model. Then an interval is over seeds and questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitos.data.files import write_text_atomic
from vitos.eval.comparison import Floats
from vitos.eval.conditions import DENSE, OWN_BOXES
from vitos.eval.figures import columns_of
from vitos.eval.seeds import SeededInterval, nested_bootstrap
from vitos.eval.selectors import SELECTORS
from vitos.eval.store import EvalFolder
from vitos.reports import values as v
from vitos.reports.page import Section, write_page
from vitos.reports.table import Sheet

BUDGETS = (0.1, 0.25, 0.5, 0.77)
PAGE, TEXT = "leaderboard.html", "leaderboard.md"
_MARKS = {"above": " ▲", "below": " ▼", "undecided": ""}
_TITLES = {DENSE: "All tokens", OWN_BOXES: "Own boxes, own budget"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A selector at a budget.

    Attributes:
        accuracy: over seeds and questions, the mean of the data sets' accuracies.
        over_random: its difference to random tokens at the same budget, question by question; None for those.
        num_questions: number of questions that some seed answered.
        kept: share of the first image's tokens.
    """

    accuracy: SeededInterval
    over_random: SeededInterval | None
    num_questions: int
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The selectors of one model, or of one model's seeds.

    Attributes:
        title: folder and model, or folder and number of seeds.
        questions: number of questions by data set.
        places: selector → budget → its figures; `dense` and `policy@own` have the budget 1 and their own.
        visible: the smallest true difference to random tokens that this study would show at each budget, the median of
            the selectors.
    """

    title: str
    questions: dict[str, int]
    places: dict[str, dict[float, Place]]
    visible: dict[float, float]


def boards(
    folders: Sequence[Path], budgets: Sequence[float] = BUDGETS, *, seeds: bool = False, samples: int = 10_000
) -> list[Board]:
    """The boards of all folders.

    Args:
        folders: folders of `vitos bench run`.
        budgets: shares of the visual tokens; those that were not asked are left out.
        seeds: whether the models of a folder are seeds of one model.
        samples: number of resamples per interval.

    Raises:
        ValueError: if a folder holds no bench, or no answer at these budgets.
    """
    found = []
    for path in folders:
        folder = EvalFolder(path)
        models = list(folder.manifest()["models"])
        for group in [models] if seeds else [[model] for model in models]:
            title = f"{path.name}, {f'{len(group)} seeds' if seeds else group[0]}"
            found.append(_board(folder, title, group, budgets, samples))
    return found


def _board(folder: EvalFolder, title: str, models: Sequence[str], budgets: Sequence[float], samples: int) -> Board:
    manifest = folder.manifest()
    questions = {name: folder.questions(name) for name in manifest["benchmarks"]}
    columns = [columns_of(folder, model, questions, manifest["conditions"]) for model in models]
    sets = np.concatenate([np.full(len(records), name) for name, records in questions.items()])

    def scores(condition: str, key: str = "correct") -> Floats:
        """Shape (seeds, questions); nan without an answer."""
        parts = [[getattr(own[condition][name], key) for name in questions] for own in columns]
        return np.stack([np.concatenate(row) for row in parts])

    def place(condition: str, chance: str = "") -> Place:
        values = scores(condition)
        compared = chance in manifest["conditions"] and chance != condition
        gained = values - scores(chance) if compared else np.full_like(values, np.nan)
        return Place(
            accuracy=nested_bootstrap(values, sets, samples=samples),
            over_random=None if np.isnan(gained).all() else nested_bootstrap(gained, sets, samples=samples),
            num_questions=int((~np.isnan(values)).any(0).sum()),
            kept=float(np.nanmean(scores(condition, "kept"))),
        )

    asked = [name for name in manifest["conditions"] if not np.isnan(scores(name)).all()]
    places = {name: {1.0: place(name)} for name in (DENSE, OWN_BOXES) if name in asked}
    for selector in SELECTORS:
        row = {b: place(f"{selector}@{b:g}", f"random@{b:g}") for b in budgets if f"{selector}@{b:g}" in asked}
        places |= {selector: row} if row else {}
    gaps = {b: [row[b].over_random for row in places.values() if b in row] for b in budgets}
    visible = {b: float(np.median([gap.visible for gap in some if gap])) for b, some in gaps.items() if any(some)}
    if not set(places) - {DENSE, OWN_BOXES}:
        raise ValueError(f"{folder.path} holds no selector at {', '.join(map(str, budgets))} of the tokens")
    return Board(
        title=title,
        questions={name: len(records) for name, records in questions.items()},
        places=places,
        visible=visible,
    )


def leaderboard_sheet(board: Board) -> Sheet:
    """Selectors in the order of their mean accuracy over the budgets, the best first; what has no budget on top."""
    budgets = sorted({budget for row in board.places.values() for budget in row if budget < 1})

    def rank(item: tuple[str, dict[float, Place]]) -> tuple[bool, float]:
        row = item[1]
        return 1.0 not in row, -sum(place.accuracy.estimate for place in row.values()) / len(row)

    rows = []
    for name, row in sorted(board.places.items(), key=rank):
        whole = row.get(1.0)
        title = _TITLES.get(name) or SELECTORS[name].title
        title += f" ({v.percent(whole.kept)} of the tokens)" if whole and whole.kept < 1 else ""
        cells = [_cell(row[b], board) if b in row else v.DASH for b in budgets]
        rows.append((title, _cell(whole, board) if whole else v.DASH, *cells))
    asked = ", ".join(f"{name} {count}" for name, count in board.questions.items())
    seen = ", ".join(f"{v.percent(b)}: {100 * board.visible[b]:.1f}" for b in budgets if b in board.visible)
    note = (
        f"Questions: {asked}. Accuracy with its 95% interval over seeds and questions; data sets count alike. "
        "▲, ▼: the interval of the difference from random tokens at the same budget lies above or "
        f"below zero. Points that a difference to random must have to be seen here in four studies of five: {seen}. "
        "n: where a selector answered fewer questions (no gold box, or its encoder makes more tokens)."
    )
    return Sheet(title=board.title, columns=("Tokens", "All", *map(v.percent, budgets)), rows=tuple(rows), note=note)


def write_leaderboard(out: Path, found: Sequence[Board]) -> None:
    """Write both files to `out`, each whole or not at all."""
    sheets = [leaderboard_sheet(board) for board in found]
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / TEXT, "\n\n".join(sheet.markdown() for sheet in sheets) + "\n")
    write_page(out / PAGE, "vitos leaderboard", [Section(sheet=sheet) for sheet in sheets])


def _cell(place: Place, board: Board) -> str:
    """`75.2% (73.2% to 77.0%) ▲`, with the number of questions where it is not all of them."""
    accuracy = place.accuracy
    text = f"{v.percent(accuracy.estimate)} ({v.percent_interval((accuracy.low, accuracy.high))})"
    if place.num_questions < sum(board.questions.values()):
        text += f", n = {place.num_questions}"
    return text + (_MARKS[place.over_random.verdict] if place.over_random else "")
