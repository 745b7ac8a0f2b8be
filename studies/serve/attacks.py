"""What a good client sees while others attack: `python studies/serve/attacks.py`.

One server, one good client that asks one question after the other. Before each attack it asks for `--seconds` seconds
undisturbed, then as long while the attack runs. The table holds its latency in both spans, with the peak memory of the
server's processes together. Writes `attacks.json` beside this file.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import gzip
import io
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
from load import HERE, bodies, serving
from PIL import Image

TOKEN = "a secret of this study"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Half: "
PATH = "/v1/chat/completions"

Outcomes = collections.Counter[str]
Attack = Callable[[str, threading.Event, Outcomes], None]


# --- what attackers send ---------------------------------------------------------------------------------------------


def _request(images: list[dict[str, Any]], text: str = "What is it?\nA. cyst\nB. mass") -> bytes:
    content = [*images, {"type": "text", "text": text}]
    return json.dumps({"model": "nano", "messages": [{"role": "user", "content": content}]}).encode()


def _part(content: bytes, kind: str, **fields: str) -> dict[str, Any]:
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 90).save(file, "png")
    return file.getvalue()


def _packed_volume(size: int) -> bytes:
    """A `.nii.gz` of a small volume followed by `size` bytes of zeros."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as out:
        out.write(nibabel.Nifti1Image(np.zeros((512, 512, size >> 19), np.int16), np.eye(4)).to_bytes())
    return file.getvalue()


def posting(body: bytes, senders: int = 4) -> Attack:
    """Clients with a token that post `body` again and again."""

    def send(base: str, ends: threading.Event, outcomes: Outcomes) -> None:
        headers = AUTHORIZATION | {"Content-Type": "application/json"}
        while not ends.is_set():
            try:
                outcomes[str(httpx.post(base + PATH, content=body, headers=headers, timeout=300).status_code)] += 1
            except httpx.TransportError as error:  # answered and closed while the body was on its way
                outcomes[type(error).__name__] += 1

    def attack(base: str, ends: threading.Event, outcomes: Outcomes) -> None:
        threads = [threading.Thread(target=send, args=(base, ends, outcomes)) for _ in range(senders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return attack


def holding(first: bytes, connections: int, drip: bytes = b"") -> Attack:
    """Connections that send `first`, then a byte of `drip` now and then, and are opened again when closed."""

    def attack(base: str, ends: threading.Event, outcomes: Outcomes) -> None:
        address = ("127.0.0.1", httpx.URL(base).port)
        held: list[socket.socket] = []
        while not ends.is_set():
            while len(held) < connections:
                client = socket.create_connection(address, timeout=10)
                client.sendall(first)
                client.setblocking(False)
                held.append(client)
                outcomes["opened"] += 1
            held, before = [client for client in held if _is_open(client, drip)], len(held)
            outcomes["closed by the server"] += before - len(held)
            ends.wait(0.2)
        for client in held:
            client.close()

    return attack


def _is_open(client: socket.socket, drip: bytes) -> bool:
    try:
        if drip:
            client.send(drip)
        if client.recv(1, socket.MSG_PEEK):
            return True  # an answer that is not read
    except BlockingIOError:
        return True
    except OSError:
        pass
    client.close()
    return False


def attacks(good: dict[str, Any]) -> dict[str, Attack]:
    """Each attack by its name."""
    stream = json.dumps(good | {"stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    unread = head.encode() + b"Content-Length: %d\r\n\r\n" % len(stream) + stream
    slow_body = head.encode() + b"Content-Length: 1000000\r\n\r\n{"
    volume = _packed_volume(500 << 20)
    return {
        "64 images in one request": posting(_request([_part(_png(3000, 1300), "image/png")] * 64)),
        "16 images of 15.6 megapixels": posting(_request([_part(_png(4800, 3250), "image/png")] * 16)),
        "one image of 15.6 megapixels": posting(_request([_part(_png(4800, 3250), "image/png")])),
        "a packed volume of 500 MiB": posting(_request([_part(volume, "application/gzip", select="axis=2&slice=3")])),
        "a packed volume beyond the limit": posting(
            _request([_part(_packed_volume(700 << 20), "application/gzip", select="axis=2&slice=3")])
        ),
        "a question of 60 kB": posting(_request([], "word " * 12_000)),
        "a question of 200 kB": posting(_request([], "word " * 40_000)),
        "a body of 40 MB": posting(b"{" + b" " * (40 << 20)),
        "150 half-sent headers, no token": holding(HALF, 150),
        "150 headers byte by byte, no token": holding(HALF, 150, b"a"),
        "60 bodies byte by byte": holding(slow_body, 60, b" "),
        "12 streams that are not read": holding(unread, 12),
    }


# --- what the good client sees ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def peak_memory(pid: int) -> Iterator[list[int]]:
    """The highest resident memory, in MiB, of a process and its children together, as the only entry of a list."""
    peak, ends = [0], threading.Event()

    def watch() -> None:
        while not ends.wait(0.05):
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                peak[0] = max(peak[0], sum(process.memory_info().rss for process in family) >> 20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ends.set()
        thread.join()


def ask_for(base: str, good: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Ask one question after the other, at least five; latencies in seconds, and what was not answered."""
    spent: list[float] = []
    refused: Outcomes = collections.Counter()
    ends, asked = time.monotonic() + seconds, 0
    while time.monotonic() < ends or asked < 5:
        started = time.perf_counter()
        status = httpx.post(base + PATH, json=good[asked % len(good)], headers=AUTHORIZATION, timeout=300).status_code
        asked += 1
        if status == 200:
            spent.append(time.perf_counter() - started)
        else:
            refused[str(status)] += 1
    return {
        "answers": len(spent),
        "refused": dict(refused),
        "p50_seconds": round(statistics.median(spent), 3) if spent else None,
        "max_seconds": round(max(spent), 3) if spent else None,
    }


def under(attack: Attack, base: str, pid: int, good: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The good client before and during one attack."""
    with peak_memory(pid) as quiet:
        before = ask_for(base, good, seconds)
    outcomes: Outcomes = collections.Counter()
    ends = threading.Event()
    thread = threading.Thread(target=attack, args=(base, ends, outcomes))
    thread.start()
    time.sleep(1)
    with peak_memory(pid) as busy:
        during = ask_for(base, good, seconds)
    ends.set()
    thread.join()
    files = psutil.Process(pid).num_fds()
    return {
        "before": before | {"peak_mib": quiet[0]},
        "during": during | {"peak_mib": busy[0]},
        "attack": dict(outcomes),
        "open_files_after": files,
    }


def line(name: str, found: dict[str, Any]) -> str:
    """One attack in words."""
    before, during = found["before"], found["during"]
    times = f"p50 {before['p50_seconds']} -> {during['p50_seconds']} s, max {during['max_seconds']} s"
    memory = f"{before['peak_mib']} -> {during['peak_mib']} MiB"
    return f"{name}: {times}, {memory}, refused {during['refused']}, attack {found['attack']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="length of each span")
    parser.add_argument("--only", help="attacks whose name holds this text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = [body | {"vitos": {"plan": "two_pass"}} for body in bodies(Path(folder))]
    found: dict[str, Any] = {}
    with serving({"VITOS_TOKEN": TOKEN}) as (base, pid):
        ask_for(base, good, args.seconds)  # all code warm, images known
        for name, attack in attacks(good[0]).items():
            if args.only and args.only not in name:
                continue
            found[name] = under(attack, base, pid, good, args.seconds)
            print(line(name, found[name]), flush=True)
    if not args.only:
        result = {"seconds": args.seconds, "cores": os.cpu_count(), "attacks": found}
        (HERE / "attacks.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
