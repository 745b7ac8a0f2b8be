"""A server on a free port, with other settings for each test, and what a request to it looks like."""

import base64
import contextlib
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

import httpx
import uvicorn

from vitos.data.phantom import write_phantoms
from vitos.data.readers import read_records
from vitos.serve.api.app import ServerSettings, build_app
from vitos.serve.api.launch import uvicorn_config


@contextlib.contextmanager
def running(vlm, **settings):
    """The address of a server that runs for as long as the block."""
    server = uvicorn.Server(uvicorn_config(build_app(vlm, ServerSettings(**settings)), port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Asker:
    """Sends chat requests to one server."""

    def __init__(self, address, token="a secret"):
        self.address = address
        self.headers = {"Authorization": f"Bearer {token}"}

    def __call__(self, messages, **fields):
        return self.post(json={"model": "nano", "messages": messages, **fields})

    def post(self, headers=None, **kwargs):
        url = f"{self.address}/v1/chat/completions"
        return httpx.post(url, headers=self.headers | (headers or {}), timeout=60, **kwargs)


@pytest.fixture(scope="session")
def serving():
    return running


@pytest.fixture(scope="session")
def asker():
    return Asker


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return read_records(write_phantoms(tmp_path_factory.mktemp("phantom"), "val", 3, 7))


@pytest.fixture(scope="session")
def image_part():
    def part(content, kind="image/png", **fields):
        content = content if isinstance(content, bytes) else content.read_bytes()
        url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        return {"type": "image_url", "image_url": {"url": url, **fields}}

    return part
