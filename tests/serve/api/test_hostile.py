"""What one client sends must not keep the others waiting, nor end in a 500."""

import asyncio
import contextlib
import gzip
import io
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from vitos.serve.api import app as app_module
from vitos.serve.api import connections
from vitos.serve.api.app import ServerSettings, build_app
from vitos.serve.api.images import MAX_UNPACKED, BadImage, ImageFile, open_all

TOKEN = "a secret"
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Half: "


@pytest.fixture(scope="module")
def address(vlm, serving):
    with serving(vlm, token=TOKEN, max_pixels=500_000, max_running=2, max_waiting=2, head_seconds=2.0) as found:
        yield found


@pytest.fixture
def ask(address, asker):
    return asker(address)


def connect(address, sent=b""):
    parts = urlsplit(address)
    client = socket.create_connection((parts.hostname, parts.port), timeout=10)
    client.sendall(sent)
    return client


def is_closed(client, seconds):
    client.settimeout(seconds)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def drip(client, byte, seconds):
    """Send bytes slowly until the server closes the connection."""
    ends = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < ends:
            client.sendall(byte)
            time.sleep(0.1)


def png(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height), 90).save(file, "png")
    return file.getvalue()


def test_half_sent_headers_keep_nobody_out_and_are_closed(address, ask):
    held = [connect(address, HALF) for _ in range(150)]  # uvicorn's limit of 4 + 64 answered 503 to everybody
    assert httpx.get(f"{address}/v1/models", headers=ask.headers).status_code == 200
    assert all(is_closed(client, 10) for client in held)


def test_headers_byte_by_byte_win_no_time(address):
    client, started = connect(address, HALF), time.monotonic()
    drip(client, b"a", 10)
    assert time.monotonic() - started < 8


def test_a_refused_body_byte_by_byte_wins_no_time(address):
    """After its 401 a client without a token may not hold the connection by going on with its body."""
    head = HALF + b"1\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    client, started = connect(address, head), time.monotonic()
    assert client.recv(100).startswith(b"HTTP/1.1 401")  # before a byte of the body
    drip(client, b" ", 10)
    assert time.monotonic() - started < 8


def test_too_many_without_a_request_lose_the_oldest(vlm, serving, monkeypatch):
    monkeypatch.setattr(connections, "MAX_UNFINISHED", 4)
    with serving(vlm) as address:  # 10 s for the headers
        held = [connect(address, HALF) for _ in range(6)]
        time.sleep(1.5)
        assert httpx.get(f"{address}/health").status_code == 200
        assert is_closed(held[0], 2)
        assert not is_closed(held[5], 0.2)
        for client in held:
            client.close()


def test_images_are_bounded_together(ask, image_part):
    question = {"type": "text", "text": "What is it?\nA. cyst\nB. mass"}
    one = image_part(png(600, 500))  # 300 000 of 500 000 pixels
    answer = ask([{"role": "user", "content": [one, one, question]}])
    assert answer.status_code == 400
    assert "image 2: the images of a request may have 500000 pixels together" in answer.json()["error"]["message"]
    answer = ask([{"role": "user", "content": [image_part(png(16, 16))] * 17 + [question]}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content.16")
    assert ask([{"role": "user", "content": [one, question]}]).status_code == 200


def nifti(shape):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    return nibabel.Nifti1Image(values, np.eye(4)).to_bytes()


def test_a_volume_is_unpacked_up_to_a_limit_and_then_opened(tmp_path, monkeypatch):
    content = nifti((32, 24, 8))
    (whole,) = open_all([ImageFile(content, True, "axis=2&slice=3")], tmp_path, 10**6)
    (packed,) = open_all([ImageFile(gzip.compress(content), True, "axis=2&slice=3")], tmp_path, 10**6)
    assert packed.picture.tobytes() == whole.picture.tobytes()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("vitos.serve.api.images.MAX_UNPACKED", 2 * len(content) - 1)
    with pytest.raises(BadImage, match="image 2: the files of a request may hold"):
        open_all([ImageFile(gzip.compress(content), True, "axis=2&slice=3")] * 2, tmp_path, 10**6)
    with pytest.raises(BadImage, match="broken or truncated"):
        open_all([ImageFile(gzip.compress(content)[:-20], True, "axis=2&slice=3")], tmp_path, 10**6)


def test_a_bomb_is_refused_soon(ask, image_part):
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=9) as out:
        out.write(nifti((4, 4, 2)))
        for _ in range(MAX_UNPACKED // (16 << 20) + 1):
            out.write(bytes(16 << 20))
    bomb = image_part(file.getvalue(), "application/gzip", select="axis=2&slice=0")
    started = time.monotonic()
    answer = ask([{"role": "user", "content": [bomb, {"type": "text", "text": "What?"}]}])
    assert answer.status_code in (400, 504)  # 504 on a machine that needs more than 10 s for 512 MiB
    assert time.monotonic() - started < 15


SLOW = """
import time
from pathlib import Path
from vitos.serve.api import images

def open_all(files, folder, max_pixels):
    until = time.monotonic() + 60
    while files[0].select and time.monotonic() < until and not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return images.open_all(files, folder, max_pixels)
"""


def test_slow_openings_end_and_free_their_slots(vlm, serving, asker, image_part, tmp_path, monkeypatch):
    (tmp_path / "slow_opening.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app_module, "open_all", __import__("slow_opening").open_all)
    question = {"type": "text", "text": "What is it?\nA. cyst\nB. mass"}
    with serving(vlm, token=TOKEN, open_seconds=4.0) as address:
        ask, answers = asker(address), []

        def send(**fields):
            content = [image_part(png(64, 64), **fields), question]
            answers.append((time.monotonic(), ask([{"role": "user", "content": content}]).status_code))
            answers[-1] = (time.monotonic() - answers[-1][0], answers[-1][1])

        threads = [threading.Thread(target=send, kwargs={"select": "frame=1"}) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        send()
        assert [status for _, status in answers] == [504, 504, 200]
        assert httpx.get(f"{address}/health").json()["running"] == 0


def test_pictures_do_not_wait_for_volumes(vlm, serving, asker, image_part, tmp_path, monkeypatch):
    (tmp_path / "slow_volumes.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app_module, "open_all", __import__("slow_volumes").open_all)
    question = {"type": "text", "text": "What is it?\nA. cyst\nB. mass"}
    volume = [image_part(nifti((8, 8, 4)), "application/x-nifti", select="axis=2&slice=3"), question]
    with serving(vlm, token=TOKEN, open_seconds=50.0) as address:
        ask, done = asker(address), []
        send = lambda: done.append(ask([{"role": "user", "content": volume}]).status_code)  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert ask([{"role": "user", "content": [image_part(png(64, 64)), question]}]).status_code == 200
        assert done == []
        (tmp_path / "go").touch()
        for thread in threads:
            thread.join(60)
        assert done == [200, 200]


HALF_EMOJI = "\ud83d"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": f"What {HALF_EMOJI}?"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF_EMOJI}]}]},
            "messages.0.content.0.text",
        ),
        ({"model": HALF_EMOJI}, "model"),
        ({"stop": ["end", HALF_EMOJI]}, "stop.1"),
        ({"vitos": {"plan": HALF_EMOJI}}, "vitos.plan"),
        ({"user": HALF_EMOJI}, "user"),
        ({"vitos": {HALF_EMOJI: 1}}, "vitos"),
        ({HALF_EMOJI: 1}, None),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_half_a_character_is_refused_by_its_field(ask, body, param, raw):
    text = json.dumps(body, ensure_ascii=not raw).encode(errors="surrogatepass")
    answer = ask.post(content=text, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_leaves_before_its_stream_begins_gives_its_place_back(
    vlm, phantoms, image_part, monkeypatch, spec_version
):
    app = build_app(vlm, ServerSettings(max_running=2, max_waiting=2))
    server, jobs, sent = app.state.server, [], []
    monkeypatch.setattr(server.scheduler, "submit", jobs.append)  # never answered: only the leaving can end it
    content = [image_part(phantoms[0].image_paths[0]), {"type": "text", "text": "What?"}]
    body = {"model": "nano", "messages": [{"role": "user", "content": content}], "stream": True}
    left = [{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}]

    async def receive():
        return left.pop(0) if len(left) > 1 else left[0]

    async def send(message):
        sent.append(message)
        raise OSError("the client is gone")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def drive():
        before = server.places
        try:
            await asyncio.wait_for(app(scope, receive, send), 30)
        except Exception as error:  # noqa: BLE001 - starlette's or ours: the client hears of none
            sent.append(error)
        return before, server.places

    before, after = asyncio.run(drive())
    server.scheduler.close()
    assert (before, after) == (4, 4)
    assert [job.cancelled for job in jobs] == [True]
    assert not any(isinstance(message, dict) and message.get("body") for message in sent)
