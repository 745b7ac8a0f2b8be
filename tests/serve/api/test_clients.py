"""What ordinary clients send, and what a page in a browser may not."""

import json
import re
import socket
from functools import partial

import httpx
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vitos.cli.main import app as cli
from vitos.serve.api import launch
from vitos.serve.api.app import ServerSettings
from vitos.serve.api.launch import listen, model_name, run_server

TOKEN = "a sécret"
OPTIONS = "\nA. cyst\nB. mass"


@pytest.fixture(scope="module")
def address(vlm, serving):
    with serving(vlm, token=TOKEN) as found:
        yield found


@pytest.fixture
def ask(address, asker):
    asking = asker(address)
    asking.headers = {"Authorization": f"Bearer {TOKEN}".encode()}
    return asking


@pytest.fixture(scope="module")
def path(phantoms):
    return phantoms[0].image_paths[0]


@pytest.fixture(scope="module")
def scan(vlm, path):
    return vlm.encode(path)


def user(*content):
    return {"role": "user", "content": list(content)}


def words(text):
    return {"type": "text", "text": text}


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["vitos"]["text"]


NOTHING = {
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "logit_bias": {},
    "top_logprobs": 0,
    "modalities": ["text"],
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "n": 1,
    "temperature": 0,
}
NULL = dict.fromkeys(
    ["tools", "tool_choice", "logit_bias", "stop", "stream", "stream_options", "vitos", "audio", "verbosity", "n"]
)


@pytest.mark.parametrize("fields", [NOTHING, NULL, {"vitos": {"plan": None, "evidence_only": None}}])
def test_fields_that_ask_for_nothing_change_nothing(ask, vlm, scan, path, image_part, fields):
    image = image_part(path, select=None, detail="auto")
    answer = ask([user(image, words("What?" + OPTIONS)) | {"tool_calls": None, "name": None}], **fields)
    assert text_of(answer) == vlm.ask(scan, "<image>What?" + OPTIONS).reasoning.completion.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
    ],
)
def test_fields_that_ask_for_something_are_refused_by_name(ask, path, image_part, fields, param):
    body = {"model": "nano", "messages": [user(image_part(path), words("What?"))], **fields}
    answer = ask.post(json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_system_message_and_earlier_turns_are_read_before_the_question(ask, vlm, scan, path, image_part):
    image = image_part(path)
    answer = ask([{"role": "system", "content": "Be brief."}, user(image, words("What?" + OPTIONS))])
    said = "Be brief.\n\n<image>What?" + OPTIONS
    assert text_of(answer) == vlm.ask(scan, said).reasoning.completion.text
    reply = {"role": "assistant", "content": "a mass", "reasoning_content": "seen", "refusal": None, "tool_calls": []}
    turns = [user(image, words("What is it?")), reply, {"role": "user", "content": "Is it large?\nA. yes\nB. no"}]
    answer = ask(turns)
    said = "Earlier question: <image>What is it?\n\nEarlier answer: a mass\n\nIs it large?\nA. yes\nB. no"
    assert text_of(answer) == vlm.ask(scan, said).reasoning.completion.text


def test_turns_that_cannot_be_honoured_are_refused(ask, path, image_part):
    image, question = image_part(path), {"role": "user", "content": "What?" + OPTIONS}

    def refusal(*messages):
        answer = ask(list(messages))
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "options (A., B. …) before the last message" in refusal(user(image, words("Q?\nA. x\nB. y")), question)
    assert "only a message of the user" in refusal({"role": "system", "content": [image]}, user(image, words("Q?")))
    assert "the last message must be the user's" in refusal(user(image, words("Q?")), {"role": "assistant"})
    assert "content is missing" in refusal({"role": "user"})
    assert "messages.0.role" in refusal({"role": "tool", "content": "5"}, user(image, words("Q?")))
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert "messages.1.tool_calls" in refusal(user(image, words("Q?")), calls, question)
    assert "no image" in refusal(question)


def test_base64_may_have_line_breaks_and_no_padding(ask, path, image_part):
    plain = image_part(path)
    expected = text_of(ask([user(plain, words("What?"))]))
    url = plain["image_url"]["url"]
    head, _, code = url.partition(",")
    for spelled in ("\r\n".join(re.findall(".{1,76}", code)) + "\n", code.rstrip("="), code + "="):
        image = {"type": "image_url", "image_url": {"url": f"{head},{spelled}"}}
        assert text_of(ask([user(image, words("What?"))])) == expected
    broken = {"type": "image_url", "image_url": {"url": f"{head},{code[:40]}*{code[40:]}"}}
    assert "not base64" in ask([user(broken, words("What?"))]).text


def test_the_same_request_twice_has_the_same_usage(ask, tmp_path, image_part):
    fresh = tmp_path / "fresh.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (60, 60), dtype=np.uint8)).save(fresh)
    first, second = (ask([user(image_part(fresh), words("What?"))]).json() for _ in range(2))
    assert first["vitos"]["tokens"] != second["vitos"]["tokens"]  # the second one found the image encoded
    assert first["usage"] == second["usage"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
        (f"BEARER {TOKEN}", 200),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        ("Bearer", 401),
        ("", 401),
        ("Bearer \xff", 401),
    ],
)
def test_the_word_bearer_in_any_case_and_not_without(address, header, status):
    sent = {"Authorization": header.encode("utf-8" if TOKEN in header else "latin-1")}
    assert httpx.get(f"{address}/v1/models", headers=sent).status_code == status


def test_a_foreign_page_gets_no_answer(vlm, serving, asker, path, image_part):
    body = {"model": "nano", "messages": [user(image_part(path), words("What?"))]}
    parts = {"request": (None, json.dumps(body))}
    with serving(vlm) as address:
        ask, page = asker(address), {"Origin": "https://example.com"}
        assert ask.post(files=parts, headers=page).status_code == 415
        assert ask.post(content=json.dumps(body), headers=page | {"Content-Type": "text/plain"}).status_code == 415
        assert ask.post(content=json.dumps(body)).status_code == 415
        assert ask.post(files=parts).status_code == 200  # no browser leaves the header out
        wanted = {"Access-Control-Request-Method": "POST"}
        preflight = httpx.options(f"{address}/v1/chat/completions", headers=page | wanted)
        assert preflight.status_code == 405
        assert "access-control-allow-origin" not in preflight.headers


def test_the_schema_asks_for_the_token_and_no_page_loads_scripts(address, ask):
    for page in ("/docs", "/redoc"):
        assert httpx.get(f"{address}{page}", headers=ask.headers).status_code == 404
    assert httpx.get(f"{address}/openapi.json").status_code == 401
    found = httpx.get(f"{address}/openapi.json", headers=ask.headers).json()
    assert "/v1/chat/completions" in found["paths"]


def test_a_model_has_the_name_of_its_run(tmp_path, monkeypatch):
    (tmp_path / "chest" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "chest" / "model")
    assert [model_name(p) for p in (".", "../model", f"{tmp_path}/chest/model/")] == ["chest"] * 3
    assert [model_name(p) for p in ("nano", "org/name", "runs/x/checkpoint-40")] == ["nano", "name", "x-checkpoint-40"]


def test_the_verb_takes_a_name(monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr(launch, "run_server", lambda *args: served.append(args[1].name))
    run = partial(CliRunner().invoke, cli)
    (tmp_path / "chest" / "model").mkdir(parents=True)
    assert run(["serve", str(tmp_path / "chest" / "model")]).exit_code == 0
    assert run(["serve", "nano", "--name", "mine"]).exit_code == 0
    assert served == ["chest", "mine"]
    assert run(["serve", "nano", "--name", " "]).exit_code == 2


def test_a_busy_port_is_said_before_the_model_and_the_address(monkeypatch):
    monkeypatch.setattr(launch.SparseVLM, "from_pretrained", lambda _: pytest.fail("the model was loaded"))
    screen = Console(record=True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} .* is busy: .*--port"):
            run_server("nano", ServerSettings(), "127.0.0.1", port, screen)
    assert not screen.export_text().strip()
    with pytest.raises(ValueError, match="no address of this machine"):
        listen("192.0.2.1", 0)


def test_a_free_port_is_shown_as_it_is(monkeypatch, vlm):
    monkeypatch.setattr(launch.SparseVLM, "from_pretrained", lambda _: vlm)
    found = []

    def run(self, sockets):
        found.append(sockets[0].getsockname()[1])
        self.config.app.state.server.scheduler.close()

    monkeypatch.setattr(launch.uvicorn.Server, "run", run)
    screen = Console(record=True)
    run_server("nano", ServerSettings(), "127.0.0.1", 0, screen)
    assert f"http://127.0.0.1:{found[0]}/v1" in screen.export_text()
