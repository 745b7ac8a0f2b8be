"""Who may talk to the demo: a page that it served, under a name that it was started for.

Without this, any website could send files and questions to a demo on its reader's machine. A website that makes its
own name point at that machine (DNS rebinding) could read the answers as well.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class HostNames:
    """The names that a request may give as its host.

    Attributes:
        names: host names and addresses in lower case, without port or brackets.
        any_address: whether every IP address is one too. A website cannot make an address point elsewhere, so this is
            safe; it is for servers that listen on all addresses of a machine.
    """

    names: frozenset[str]
    any_address: bool = False

    @classmethod
    def of(cls, host: str, more: Iterable[str] = ()) -> HostNames:
        """The names of a server that listens on `host`: this machine's own, `host`, and `more`."""
        bound = host.strip("[]").lower()
        everywhere = _is_address(bound) and ip_address(bound).is_unspecified
        own = [socket.gethostname()] if everywhere else []
        names = (*LOCAL, bound, *own, *(name.strip("[]") for name in more))
        return cls(frozenset(name.lower() for name in names), everywhere)

    def __contains__(self, authority: str) -> bool:
        """Whether the host of `authority`, which is `host` or `host:port`, is one of the names."""
        try:
            name = urlsplit(f"//{authority}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (self.any_address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class SameOrigin:
    """ASGI middleware that refuses requests for other hosts (421) and from pages of other origins (403)."""

    def __init__(self, app: ASGIApp, hosts: HostNames) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            wanted = "The demo was not started for this host name; name it with --allow-host.\n"
            await PlainTextResponse(wanted, 421)(scope, receive, send)
        elif any(_authority(origin) != hosts[0].lower() for origin in origins):
            await PlainTextResponse("The demo takes requests from its own page only.\n", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _authority(origin: str) -> str:
    """Host and port of an origin, as its requests name their host; empty for "null"."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
