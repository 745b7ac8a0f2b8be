"""A judge over real HTTP that can be slow, wrong, rude, broken and talkative. Standard library only."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_of(prompt: str) -> str:
    """The answer that a prompt of vitos asks about."""
    return json.loads(
        next(line for line in prompt.splitlines() if line.startswith("Answer: ")).removeprefix("Answer: ")
    )


def gold_of(prompt: str) -> str | list[str]:
    return json.loads(next(line for line in prompt.splitlines() if line.startswith("Reference: ")).split(": ", 1)[1])


def completion(text, tokens=7) -> bytes:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"total_tokens": tokens}}
    return json.dumps(body).encode()


@dataclass
class StubJudge:
    """`behave(handler, prompt, number)` answers request `number`, from 0; by default every answer is right.

    Attributes:
        prompts, headers, bodies: what was asked.
        most: largest number of requests at the same time.
    """

    behave: Callable = lambda handler, prompt, number: handler.ok("right")
    models: tuple[str, ...] = ("stub",)
    prompts: list[str] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    stub: StubJudge

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, json.dumps({"data": [{"id": name} for name in self.stub.models]}).encode())

    def do_POST(self):
        stub, body = self.stub, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with stub.lock:
            number = len(stub.prompts)
            stub.prompts.append(prompt)
            stub.headers.append(dict(self.headers))
            stub.bodies.append(body)
            stub.now += 1
            stub.most = max(stub.most, stub.now)
        try:
            with suppress(ConnectionError):
                stub.behave(self, prompt, number)
        finally:
            with stub.lock:
                stub.now -= 1

    def ok(self, text, tokens=7):
        self.reply(200, completion(text, tokens))

    def reply(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        """Close the connection with a reset, without a reply."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def flood(self):
        """A reply without an end."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while True:
            self.wfile.write(b"x" * 65536)

    def drip(self, seconds):
        """A reply that comes byte by byte, each in time."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.02)


@contextmanager
def serving(stub: StubJudge):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
