"""Prompts of different lengths in batches of a limited size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def chunk_by_tokens(sizes: Sequence[tuple[int, int]], budget: int, narrowest: float = 0.0) -> Iterator[list[int]]:
    """Indices of prompts, longest first, in chunks whose padded tokens stay within the budget.

    Args:
        sizes: number of rows of each prompt, and number of tokens of the longest of them.
        budget: limit on the number of rows of a chunk times its longest row; a single prompt may exceed it.
        narrowest: share of a chunk's longest row below which a prompt begins the next chunk, so that one long prompt
            does not pad many short ones to its length.
    """
    chunk: list[int] = []
    rows = widest = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i)):
        own, width = sizes[i]
        if chunk and ((rows + own) * widest > budget or width < narrowest * widest):
            yield chunk
            chunk, rows = [], 0
        if not chunk:
            widest = width
        chunk.append(i)
        rows += own
    if chunk:
        yield chunk
