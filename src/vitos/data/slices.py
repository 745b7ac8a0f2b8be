"""Which slices of a series are looked at: `every 4th`, `12 evenly`, `10-40`, `all`. Slices are counted from 1."""

from __future__ import annotations

import re

_EVERY = re.compile(r"every (\d{1,4})(?:st|nd|rd|th)?", re.ASCII)
_EVENLY = re.compile(r"(\d{1,4}) evenly", re.ASCII)
_RANGE = re.compile(r"(\d{1,5}) ?- ?(\d{1,5})", re.ASCII)
FORMS = "every 4th, 12 evenly, 10-40 or all"


def chosen_slices(rule: str, total: int) -> tuple[int, ...]:
    """The numbers of the chosen slices, in order.

    `every 4th` begins with the first slice. `12 evenly` takes the middles of twelve stretches of equal length, so that
    the ends of a scan, which often show nothing, do not count more than the rest.

    >>> chosen_slices("every 4th", 10), chosen_slices("3 evenly", 9), chosen_slices("8-10", 10)
    ((1, 5, 9), (2, 5, 8), (8, 9, 10))

    Args:
        rule: one of the forms above.
        total: number of slices of the series.

    Raises:
        ValueError: if the rule has another form, or asks for slices that are not there.
    """
    text = rule.strip().lower()
    if text == "all":
        return tuple(range(1, total + 1))
    if (match := _EVERY.fullmatch(text)) and int(match[1]) > 0:
        return tuple(range(1, total + 1, int(match[1])))
    if (match := _EVENLY.fullmatch(text)) and (count := int(match[1])) > 0:
        if count > total:
            raise ValueError(f"{rule!r} asks for more slices than the {total} of the series; write all")
        return tuple((2 * i + 1) * total // (2 * count) + 1 for i in range(count))
    if (match := _RANGE.fullmatch(text)) and 0 < int(match[1]) <= int(match[2]):
        if int(match[2]) > total:
            raise ValueError(f"{rule!r} ends behind the last slice; the series has {total}")
        return tuple(range(int(match[1]), int(match[2]) + 1))
    raise ValueError(f"{rule!r} chooses no slices; write {FORMS}")
