"""Start the server: uvicorn in one process, and what the screen shows meanwhile."""

from __future__ import annotations

import dataclasses

import uvicorn
from rich.console import Console

from vitos.policy.vlm import SparseVLM
from vitos.serve.api.app import ServerSettings, build_app


def run_server(checkpoint: str, settings: ServerSettings, host: str, port: int, console: Console) -> None:
    """Serve until SIGINT or SIGTERM; questions that are being answered then are finished first.

    Raises:
        ValueError: if the folder of images does not exist.
    """
    if settings.images is not None:
        if not settings.images.is_dir():
            raise ValueError(
                f"{settings.images}: there is no such folder; name one that holds the images to be served"
            )
        settings = dataclasses.replace(settings, images=settings.images.resolve())
    app = build_app(SparseVLM.from_pretrained(checkpoint), settings)
    console.print(f"{settings.name}: http://{host}:{port}/v1   (docs: /docs, figures: /metrics)")
    if settings.token is None:
        console.print(
            "[yellow]No token: anyone who reaches this address may ask questions; set VITOS_TOKEN to require one.[/]"
        )
    console.print("[dim]Research use only; not a medical device.[/dim]")
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(settings.seconds) + 1,
        limit_concurrency=settings.max_running + settings.max_waiting + 64,
    )
