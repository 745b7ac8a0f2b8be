"""The demo as a browser or another program sees it: the real server, asked over HTTP."""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.serve.dicom import write_dicom

pytest.importorskip("gradio", reason="the demo extra is not installed")

from vitos.serve.demo.guard import HostNames
from vitos.serve.demo.page import launch


@pytest.fixture(scope="module")
def served(vlm, tmp_path_factory):
    page, address = launch(
        vlm, tmp_path_factory.mktemp("served"), port=None, block=False, allow_hosts=["Demo.example.org"]
    )
    yield page, address
    page.close()


@pytest.fixture(scope="module")
def port(served):
    return urlsplit(served[1]).port


# --- hosts and origins ----------------------------------------------------------------------------------------------

PATHS = ("", "config", "theme.css", "gradio_api/startup-events", "gradio_api/file=/etc/passwd", "no/such/page")


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.9", ""])
def test_a_foreign_host_gets_nothing(served, port, name):
    """DNS rebinding: host and origin are both the attacker's, so they are equal."""
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS"):
            headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
            found = httpx.request(method, served[1] + path, headers=headers)
            assert found.status_code == 421
            assert not [header for header in found.headers if header.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1:{port}.evil.example", "file://"]
)
def test_a_foreign_origin_gets_nothing_and_uploads_nothing(served, port, origin):
    headers = {"Origin": origin.format(port=port)}
    preflight = headers | {"Access-Control-Request-Method": "POST"}
    for found in (
        httpx.get(served[1], headers=headers),
        httpx.options(f"{served[1]}gradio_api/upload", headers=preflight),
        httpx.post(f"{served[1]}gradio_api/upload", headers=headers, files={"files": ("a.png", b"abc")}),
        httpx.post(f"{served[1]}gradio_api/queue/join", headers=headers, json={"data": []}),
    ):
        assert found.status_code == 403
        assert not [header for header in found.headers if header.startswith("access-control")]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "demo.example.org"])
def test_the_names_that_the_demo_was_started_for(served, port, name):
    headers = {"Host": f"{name}:{port}"}
    assert httpx.get(served[1], headers=headers).status_code == 200
    headers["Origin"] = f"http://{name.lower()}:{port}"
    upload = httpx.post(f"{served[1]}gradio_api/upload", headers=headers, files={"files": ("a.png", b"abc")})
    assert upload.status_code == 200


def test_names_of_hosts():
    local = HostNames.of("127.0.0.1")
    assert "[::1]:7860" in local
    assert "192.168.0.7" not in local
    assert "[::1" not in local
    everywhere = HostNames.of("0.0.0.0", ["ward-3"])
    assert {name: name in everywhere for name in ("192.168.0.7:80", "[fe80::1]", "WARD-3:7860", "evil.example")} == {
        "192.168.0.7:80": True, "[fe80::1]": True, "WARD-3:7860": True, "evil.example": False
    }  # fmt: skip
    assert "10.1.2.3" in HostNames.of("10.1.2.3")
    assert "10.1.2.4" not in HostNames.of("10.1.2.3")


# --- events over HTTP -----------------------------------------------------------------------------------------------


class Tab:
    """A browser tab: it sends events to the page's queue and reads what comes back."""

    def __init__(self, page, address, name):
        self.page, self.address, self.name = page, address, name

    def event(self, function, *values, number=0):
        """The new values that the events of a function of `Handlers` yield, each as the page gets them."""
        fns = [f for f in self.page.fns.values() if getattr(getattr(f.fn, "func", f.fn), "__name__", "") == function]
        body = {"data": list(values), "fn_index": fns[number]._id, "session_hash": self.name, "trigger_id": None}
        httpx.post(f"{self.address}gradio_api/queue/join", json=body).raise_for_status()
        out = []
        url = f"{self.address}gradio_api/queue/data"
        with httpx.stream("GET", url, params={"session_hash": self.name}, timeout=60) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") in ("process_generating", "process_completed"):
                    assert message["success"], message
                    out.append(message["output"]["data"])
                if message.get("msg") == "process_completed":
                    return out
        raise AssertionError("the stream ended early")


def test_an_example_is_opened_and_answered_and_its_pictures_are_served(served):
    tab = Tab(*served, "one")
    first, *_ = tab.event("open_example", None, number=4)
    question = first[1]
    assert question.startswith("Which is larger")
    tab.event("begin", None, 0, 1, question)
    (out,) = tab.event("ask", None, 0, 1, question, "two_pass", 0.0, "", 0, ["boxes"])
    assert "64 of 64" in out[0]
    for update in out[3:6]:
        file = httpx.get(served[1].rstrip("/") + update["value"]["url"].removeprefix(served[1].rstrip("/")))
        assert file.content[:8] == b"\x89PNG\r\n\x1a\n"
    assert Tab(*served, "two").event("take", None) == [[""]]
    (found,) = tab.event("take", None)
    assert found[0].count(",") >= 3


def upload(address, path):
    """A file as the page's field for files sends it."""
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    return {"path": sent.json()[0], "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def test_sliders_that_still_show_a_larger_window_are_no_error(served, tmp_path):
    """The browser sends what a slider held before its range shrank; a server that checks it raises an error."""
    Image.fromarray(np.linspace(0, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "wide.png")
    narrow = write_dicom(tmp_path / "narrow.dcm")
    tab = Tab(*served, "sliders")
    *_, _ = tab.event("open", None, [upload(served[1], tmp_path / "wide.png")])
    assert tab.event("draw", None, 30000, 60000, "")
    tab.event("open", None, [upload(served[1], narrow)])
    tab.event("begin", None, 30000, 60000, "What?")
    for window in ((30000, 60000), (0, 0)):
        tab.event("change", None, *window, "What?")
        (drawn,) = tab.event("draw", None, *window, "")
        assert drawn[0]["url"]
    tab.event("begin", None, 30000, 60000, "What?")
    (out,) = tab.event("ask", None, 30000, 60000, "What?", "two_pass", 0.0, "0, 0, 0.5, 0.5", 0, [])
    assert "4 of 16" in out[1]
    left = list(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"))
    assert left
    assert not [file for file in left if "narrow" in file.name or "wide" in file.name]


def test_a_mistake_is_one_message_and_no_error_of_the_event(served):
    """An event that fails marks all of its components; this one succeeds and leaves them as they are."""
    (out,) = Tab(*served, "three").event("ask", None, 0, 1, "What?", "two_pass", 0.0, "", 0, [])
    assert len(out) == 10
    assert all(new["__type__"] == "update" and "value" not in str(new) for new in out)
