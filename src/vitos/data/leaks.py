"""What makes a test measure memory: images and questions that are in two splits, and answers that contradict.

Everything is compared by content, across all files that are checked together. Warnings: an image in two splits, a
question twice with one answer, and a question with two answers. Notes: other slices or frames of one file in two
splits, which are one patient's, and images that look like copies of each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from unicodedata import normalize

from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.data.fields import show
from vitos.data.looks import Look, near_copies
from vitos.data.readers import Problem, Severity

_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """An item of a record file that is checked.

    Attributes:
        source: number of the file or folder among those given to the check.
        split: items of one split may share images.
        sample: how problems name it.
        images: as in its record; those that exist where there is none.
        record: None where the item is not valid.
    """

    source: int
    split: str
    sample: str
    images: tuple[Path, ...]
    record: Record | None


def find_leaks(uses: Sequence[Use], looks: Mapping[Path, Look]) -> Iterator[tuple[int, Problem]]:
    """(source, problem) for all that is shared; the source is that of the later item.

    Args:
        uses: all items, in the order of the files.
        looks: of the images that can be opened.
    """
    yield from _shared_images(uses, looks)
    yield from _repeated_questions(uses, looks)


# --- images ---------------------------------------------------------------------------------------------------------

Seen = dict[str, tuple[Path, Use]]
"""The pixels of each picture of a split → where it is used first."""

_WAYS: tuple[tuple[str, str, Severity, tuple[str, ...]], ...] = (
    ("are also", "keep each image in one split", "warning", ("picture", "place")),
    ("are other slices or frames of files", "keep each patient in one split", "note", ("file",)),
)


def _shared_images(uses: Sequence[Use], looks: Mapping[Path, Look]) -> Iterator[tuple[int, Problem]]:
    splits: dict[str, Seen] = {}
    for use in uses:
        for path in use.images:
            if path in looks:
                splits.setdefault(use.split, {}).setdefault(looks[path].picture, (path, use))
    for first, second in combinations(splits, 2):
        yield from _shared_by_two(splits[first], splits[second], looks)


def _shared_by_two(first: Seen, second: Seen, looks: Mapping[Path, Look]) -> Iterator[tuple[int, Problem]]:
    """Problems of two splits, one for each way in which images are shared; an image is named for the worst only."""
    rest = dict(second)
    for how, remedy, severity, keys in _WAYS:
        known = {getattr(looks[path], key): (path, use) for path, use in first.values() for key in keys}
        pairs = []
        for picture, (path, use) in list(rest.items()):
            found = [known[value] for key in keys if (value := getattr(looks[path], key)) in known]
            if found:
                pairs.append(((path, use), found[0]))
                del rest[picture]
        yield from _about_images(pairs, how, remedy, severity)
    looks_of = ({picture: looks[path] for picture, (path, _) in seen.items()} for seen in (rest, first))
    copies = [(rest[one], first[other]) for one, other in near_copies(*looks_of)]
    yield from _about_images(copies, "look like copies of images", "compare them by eye", "note")


def _about_images(
    pairs: Sequence[tuple[tuple[Path, Use], tuple[Path, Use]]], how: str, remedy: str, severity: Severity
) -> Iterator[tuple[int, Problem]]:
    """One problem for all pairs of (image of the later split, image of the earlier one)."""
    if not pairs:
        return
    examples = [
        f"{path.name} ({use.sample}) and {other.name} ({before.sample})" for (path, use), (other, before) in pairs
    ]
    use, before = pairs[0][0][1], pairs[0][1][1]
    more = ", …" if len(pairs) > _EXAMPLES else ""
    problem = f"{len(pairs)} image(s) of {use.split} {how} in {before.split}: {', '.join(examples[:_EXAMPLES])}{more}"
    yield use.source, Problem(use.sample, "image_path", problem, remedy, severity)


# --- questions ------------------------------------------------------------------------------------------------------


def _repeated_questions(uses: Sequence[Use], looks: Mapping[Path, Look]) -> Iterator[tuple[int, Problem]]:
    """Every question that was asked of the same picture before."""
    first: dict[object, Use] = {}
    for use in uses:
        record = use.record
        if record is None or not all(path in looks for path in record.image_paths):
            continue
        asked, answer = _essence(record)
        before = first.setdefault((asked, *(looks[path].shown for path in record.image_paths)), use)
        if before is use or before.record is None:
            continue
        other = _essence(before.record)[1]
        if answer != other:
            problem = f"is the question of {before.sample}, but its answer is {show(answer)} and not {show(other)}"
            yield use.source, Problem(use.sample, "answer", problem, "correct one of them", "warning")
        elif use.split == before.split:
            problem = f"is the question of {before.sample} again"
            yield use.source, Problem(use.sample, "question", problem, "remove one of them", "warning")
        else:
            problem = f"is the question of {before.sample} in {before.split} again"
            yield use.source, Problem(use.sample, "question", problem, "keep it in one split", "warning")


def _essence(record: Record) -> tuple[object, str]:
    """What is asked, whatever the letters and the order of the options, and the text of the right answer."""
    text = _plain(record.question.replace(IMAGE_PLACEHOLDER, " "))
    options = {letter: _plain(option) for letter, option in record.options.items()}
    for letter, option in options.items():
        text = re.sub(rf"\(?\b{letter.casefold()}\W+{re.escape(option)}", " ", text, count=1)
    return (_plain(text), *sorted(options.values())), options.get(record.answer, _plain(record.answer))


def _plain(text: str) -> str:
    return " ".join(normalize("NFC", text).casefold().split())
