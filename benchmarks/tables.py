"""The one writer of Markdown tables for measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pipe_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a pipe table.

    Args:
        columns: heads of the columns.
        rows: cells of each row, as many as there are columns.
        left: number of columns that are aligned to the left; figures are aligned to the right.
    """
    aligned = [":--"] * left + ["--:"] * (len(columns) - left)
    return [f"| {' | '.join(cells)} |" for cells in (columns, aligned, *rows)]
