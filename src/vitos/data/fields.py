"""What the fields of a record are checked with: how a problem is reported, and how a value is shown in it."""

from __future__ import annotations

from collections.abc import Callable

from vitos.data.names import half_character

Report = Callable[[str, str, str], None]  # (field, problem, remedy)


def is_broken(field: str, text: str, report: Report) -> bool:
    """Whether a text cannot be written or tokenized; reported."""
    half = half_character(text)
    if half is not None:
        report(
            field, f"holds half a character ({half}), as a cut emoji leaves it", "delete it, or export the text again"
        )
    return half is not None


def show(value: object) -> str:
    """A value from data for a message: short and on one line, control characters escaped."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
