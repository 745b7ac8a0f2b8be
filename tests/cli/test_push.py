"""`vitos push` against a hub that this test plays over HTTP: what huggingface_hub sends, and what it does not."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from vitos.cli.push import push_to_hub
from vitos.nano import NANO
from vitos.policy.locate import resolve_model_path
from vitos.reports.card import model_card


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and one commit; files are sent inside the commit, since none is large (LFS)."""

    def do_POST(self):
        raw = (
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        self.server.seen.append((self.path, raw))
        self.server.tokens.append(self.headers["Authorization"])
        if self.path.endswith("/repos/create"):
            answer = {"url": f"{self.server.address}/me/mine", "id": "me/mine"}
        elif "/preupload/" in self.path:
            files = json.loads(raw)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/mine/commit/1", "commitOid": "1" * 40}
        else:
            answer = {"errors": [], "warnings": []}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunks(self):
        """A body in chunks."""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.tokens = [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model_path(NANO), folder)
    results = {
        "name": "mine",
        "dataset": "test.json",
        "sparse_accuracy": 0.9062,
        "kept_ratio": 0.0824,
        "mean_iou": None,
    }
    (folder / "README.md").write_text(model_card(results, {"name": "mine"}, "nano"))
    (folder / "eval").mkdir()
    (folder / "eval/results.json").write_text('{"patient": "Jane"}')
    (folder / "notes.csv").write_text("Jane")
    return folder


def test_model_and_card_are_published_and_nothing_else(hub, model):
    assert push_to_hub(model, "me/mine") == f"{hub.address}/me/mine/commit/1"
    assert set(hub.tokens) == {"Bearer hf_of_this_test"}
    (created,) = [json.loads(raw) for path, raw in hub.seen if path.endswith("/repos/create")]
    assert (created["name"], created["organization"], created["visibility"]) == ("mine", "me", "private")
    (commit,) = [raw for path, raw in hub.seen if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    expected = {path.name for path in model.iterdir() if path.is_file()} - {"notes.csv"}
    assert set(sent) == expected
    assert {"config.json", "model.safetensors", "vitos.json", "README.md"} <= expected
    for name, data in sent.items():
        assert hashlib.sha256(data).digest() == hashlib.sha256((model / name).read_bytes()).digest()
    assert not any(b"Jane" in raw for _, raw in hub.seen)
    found = {r.metric_type: r.metric_value for r in ModelCard(sent["README.md"].decode()).data.eval_results}
    assert found == {"accuracy": 0.9062, "ratio": 0.0824}


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [("mine", None, "owner/name"), ("me/mine", "config.json", "holds no model"), ("me/mine", "README.md", "no card")],
)
def test_what_cannot_be_published_is_refused_before_anything_is_sent(hub, model, name, gone, message):
    if gone:
        (model / gone).unlink()
    with pytest.raises(ValueError, match=message):
        push_to_hub(model, name)
    assert hub.seen == []
