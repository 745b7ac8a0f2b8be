"""Start the server: uvicorn in one process, and what the screen shows meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from vitos.policy.vlm import SparseVLM
from vitos.serve import NOTICE
from vitos.serve.api.app import ServerSettings, build_app
from vitos.serve.api.connections import BoundedConnection


def model_name(checkpoint: str) -> str:
    """The name of a model in the API: the last part of its path, or the run's name where that part says nothing.

    >>> model_name("runs/chest/model"), model_name("runs/chest/checkpoint-40"), model_name("org/name")
    ('chest', 'chest-checkpoint-40', 'name')
    """
    path = Path(checkpoint)
    path = path.resolve() if path.is_dir() else path
    if not path.parent.name:
        return path.name
    if path.name == "model":
        return path.parent.name
    return f"{path.parent.name}-{path.name}" if re.fullmatch(r"checkpoint-\d+", path.name) else path.name


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a busy port is known before a model is loaded and an address is shown.

    Args:
        port: 0: any free one.

    Raises:
        ValueError: the address cannot be had; says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            told = (
                f"port {port} of {host} is busy: another program listens there; stop it, or choose another by --port"
            )
        elif error.errno in (errno.EACCES, errno.EPERM):
            told = f"port {port} may not be used by this user; choose one from 1024 on by --port"
        else:
            told = f"{host} is no address of this machine ({error.strerror}); choose one by --host"
        raise ValueError(told) from None


def uvicorn_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How uvicorn runs the application, its connections bounded.

    Args:
        options: more of `uvicorn.Config`.
    """
    settings: ServerSettings = app.state.server.settings
    protocol = partial(BoundedConnection, head_seconds=settings.head_seconds)
    return uvicorn.Config(
        app,
        http=cast(Any, protocol),
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(settings.seconds) + 1,
        **options,
    )


def run_server(checkpoint: str, settings: ServerSettings, host: str, port: int, console: Console) -> None:
    """Serve until SIGINT or SIGTERM; questions that are being answered then are finished first.

    Raises:
        ValueError: if the folder of images does not exist, or the address cannot be had.
    """
    if settings.images is not None:
        if not settings.images.is_dir():
            raise ValueError(
                f"{settings.images}: there is no such folder; name one that holds the images to be served"
            )
        settings = dataclasses.replace(settings, images=settings.images.resolve())
    with listen(host, port) as listening:
        app = build_app(SparseVLM.from_pretrained(checkpoint), settings)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        console.print(
            f"{settings.name}: {address}/v1   (schema: /openapi.json, figures: /metrics)", markup=False, soft_wrap=True
        )
        if settings.token is None:
            console.print(
                "[yellow]No token: anyone who reaches this address may ask questions; "
                "set VITOS_TOKEN to require one.[/]"
            )
        console.print(f"[dim]{NOTICE}[/dim]")
        try:
            uvicorn.Server(uvicorn_config(app)).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has finished what was being answered
            return
