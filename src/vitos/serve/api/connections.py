"""Connections on which no request has arrived yet: how long they may be held, and how many of them.

uvicorn's own limit counts every connection, so that half-sent headers would shut out everybody. Here a connection
without a request holds no place: it is closed after a time, and the oldest ones as soon as there are too many.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_UNFINISHED = 128
"""Largest number of connections without a request, of those older than a second."""

_YOUNG = 1.0  # seconds in which an honest client sends its headers, however many connect at once


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed if the headers of the next request do not arrive in time.

    Args:
        head_seconds: time from the start of the connection, or from the last response, to the end of the headers.
    """

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_seconds = head_seconds
        self._ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        held = [c for c in self.connections if isinstance(c, BoundedConnection) and c.held() > _YOUNG]
        for connection in sorted(held, key=BoundedConnection.held, reverse=True)[: max(0, len(held) - MAX_UNFINISHED)]:
            connection.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def held(self) -> float:
        """Seconds for which the connection has been without a request; 0 while there is one."""
        return 0.0 if self._ends is None else self.loop.time() - (self._ends.when() - self._head_seconds)

    def _watch(self) -> None:
        """Start the clock when there is no request, stop it when there is one; bytes that come in do not reset it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._ends is None and not self.transport.is_closing():
            self._ends = self.loop.call_later(self._head_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None
