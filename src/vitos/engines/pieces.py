"""Growing text, piece by piece."""

from __future__ import annotations


class Pieces:
    """What is new of a text that grows token by token. A character may need several: half of one is not shown."""

    def __init__(self) -> None:
        self._shown = ""

    def next(self, text: str) -> str:
        """What can be shown now, of the whole text so far; often nothing."""
        return "" if text.endswith("\ufffd") or not text.startswith(self._shown) else self.rest(text)

    def rest(self, text: str) -> str:
        """What was not shown yet of the finished text."""
        piece, self._shown = text[len(self._shown) :], text
        return piece
