"""The server as OpenAI's own client sees it over a real socket, and what it must refuse."""

import base64
import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="the official client is the test: pip install openai")

import httpx  # noqa: E402
import uvicorn  # noqa: E402
from PIL import Image  # noqa: E402

from vitos.core.geometry import Box  # noqa: E402
from vitos.data.phantom import write_phantoms  # noqa: E402
from vitos.data.readers import read_records  # noqa: E402
from vitos.policy.vlm import SparseVLM  # noqa: E402
from vitos.serve.api.app import ServerSettings, build_app  # noqa: E402
from vitos.serve.api.launch import uvicorn_config  # noqa: E402

TOKEN = "a secret"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read_records(write_phantoms(tmp_path_factory.mktemp("phantom"), "val", 6, 7))


@pytest.fixture(scope="module")
def server(records):
    folder = records[0].image_paths[0].parent
    settings = ServerSettings(
        token=TOKEN, images=folder, max_running=4, max_waiting=4, max_bytes=1 << 20, max_pixels=10**6
    )
    running = uvicorn.Server(uvicorn_config(build_app(SparseVLM.from_pretrained("nano"), settings), port=0))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=TOKEN, max_retries=0)


def uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def message(record, url=None):
    image = {"type": "image_url", "image_url": {"url": url or uri(record.image_paths[0])}}
    return [{"role": "user", "content": [image, {"type": "text", "text": record.question.replace("<image>", "")}]}]


def post(server, body, token=TOKEN, **kwargs):
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{server}/v1/chat/completions", json=body, headers=headers, timeout=60, **kwargs)


@pytest.mark.parametrize("plan", ["two_pass", "gather", "coarse", "dense", "crop"])
def test_answers_are_those_of_ask(client, records, plan):
    vlm = SparseVLM.from_pretrained("nano")
    for record in records[:3]:
        expected = vlm.ask(vlm.encode(record.image_paths[0], plan=plan), record.question, plan=plan)
        answer = client.chat.completions.create(
            model="nano", messages=message(record), extra_body={"vitos": {"plan": plan}}
        )
        found = answer.model_extra["vitos"]
        assert found["text"] == expected.reasoning.completion.text
        assert found["answer"] == expected.answer
        assert [tuple(box) for box in found["boxes"]] == [box.as_tuple() for box in expected.boxes]
        assert (found["kept_tokens"], found["plan"], found["fallback"]) == (
            expected.kept.count,
            plan,
            expected.fallback,
        )
        assert answer.choices[0].message.content.startswith(expected.answer or "")
        assert answer.usage.completion_tokens == sum(n for k, n in found["tokens"].items() if k.endswith("_decode"))


def test_a_persons_boxes_and_a_budget_are_arguments(client, records):
    vlm, record, box = SparseVLM.from_pretrained("nano"), records[0], (0.0, 0.0, 0.5, 0.25)
    scan = vlm.encode(record.image_paths[0])
    for given in ({"boxes": [box]}, {"boxes": [box], "budget": 0.25}, {"budget": 0.25}):
        boxes = [Box(*box)] if "boxes" in given else None
        expected = vlm.ask(scan, record.question, boxes=boxes, budget=given.get("budget"))
        answer = client.chat.completions.create(model="nano", messages=message(record), extra_body={"vitos": given})
        found = answer.model_extra["vitos"]
        assert found["text"] == expected.reasoning.completion.text
        assert found["kept_tokens"] == expected.kept.count
        assert [tuple(edges) for edges in found["boxes"]] == [b.as_tuple() for b in expected.boxes]


def test_evidence_lies_in_one_of_several_images(client, records):
    vlm, paths = SparseVLM.from_pretrained("nano"), [record.image_paths[0] for record in records[:3]]
    content = []
    for number, path in zip((4, 8, 12), paths, strict=True):
        content += [
            {"type": "text", "text": f"Slice {number}:"},
            {"type": "image_url", "image_url": {"url": uri(path)}},
        ]
    content.append({"type": "text", "text": "What is it?\nA. cyst\nB. mass"})
    expected = vlm.ask(
        vlm.encode(*paths, lead="Slice 4:<image>\nSlice 8:<image>\nSlice 12:<image>\n"),
        "What is it?\nA. cyst\nB. mass",
        boxes=[Box(0, 0, 0.5, 0.25), Box(0, 0.5, 0.25, 1, 3)],
    )
    given = {"boxes": [[0, 0, 0.5, 0.25], {"image": 3, "box": [0, 0.5, 0.25, 1]}]}
    answer = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": content}], extra_body={"vitos": given}
    )
    found = answer.model_extra["vitos"]
    assert found["boxes"] == given["boxes"]
    assert found["kept_per_image"] == [one.count for one in expected.kept.images] == [8, 0, 8]
    assert (found["kept_tokens"], found["visual_tokens"]) == (16, 192)
    assert len(found["images"]) == 3


@pytest.mark.parametrize("size", [60_000, 200_000])
def test_a_question_longer_than_the_context_is_refused_at_once(server, records, size):
    long = replace(records[0], question=records[0].question + "lung " * (size // 5))
    started = time.perf_counter()
    answer = post(server, {"model": "nano", "messages": message(long)})
    assert answer.status_code == 400
    assert "context is 4096" in answer.json()["error"]["message"]
    assert time.perf_counter() - started < 10
    assert post(server, {"model": "nano", "messages": message(records[0])}).status_code == 200


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"boxes": [[0, 0, 2, 2]]}, "vitos.boxes"),
        ({"boxes": []}, "vitos.boxes"),
        ({"boxes": [[0, 0, 0.5]]}, "vitos.boxes"),
        ({"boxes": [{"image": 0, "box": [0, 0, 1, 1]}]}, "vitos.boxes"),
        ({"boxes": [{"image": 1, "box": [0, 0, 1, 2]}]}, "vitos.boxes"),
        ({"boxes": [{"image": 2, "box": [0, 0, 1, 1]}]}, "a box lies in image 2, but the question has 1"),
        ({"budget": 0}, "vitos.budget"),
        ({"budget": 1.5}, "vitos.budget"),
        ({"plan": "fast"}, "vitos.plan"),
        ({"plan": "crop", "budget": 0.5}, "leave out the budget"),
    ],
)
def test_evidence_that_cannot_be_used_is_refused_by_its_field(server, records, given, said):
    answer = post(server, {"model": "nano", "messages": message(records[0]), "vitos": given})
    assert answer.status_code == 400
    assert said in answer.text


def test_streams_join_to_the_same_answer(client, records):
    whole = client.chat.completions.create(model="nano", messages=message(records[0]))
    chunks = list(
        client.chat.completions.create(
            model="nano", messages=message(records[0]), stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    thought = "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas)
    assert thought == whole.model_extra["vitos"]["thought"]
    extras = [chunk.model_extra["vitos"] for chunk in chunks if "vitos" in (chunk.model_extra or {})]
    pieces = [extra["text"] for extra in extras if extra.get("branch") == "reason"]
    assert "".join(pieces) == whole.model_extra["vitos"]["text"] == extras[-1]["text"]
    assert chunks[-1].usage == whole.usage


def test_together_is_as_alone(client, records):
    alone = [client.chat.completions.create(model="nano", messages=message(r)).model_extra["vitos"] for r in records]
    answers = [None] * len(records)

    def ask(i):
        answers[i] = client.chat.completions.create(model="nano", messages=message(records[i])).model_extra["vitos"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(records))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a["text"] for a in answers] == [a["text"] for a in alone]


def test_multipart_and_the_folder(server, client, records):
    path = records[0].image_paths[0]
    expected = client.chat.completions.create(model="nano", messages=message(records[0]))
    body = {"model": "nano", "messages": message(records[0], "attachment:scan.png")}
    sent = httpx.post(
        f"{server}/v1/chat/completions",
        data={"request": json.dumps(body)},
        files={"scan": ("scan.png", path.read_bytes(), "image/png")},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=60,
    )
    assert sent.status_code == 200, sent.text
    named = post(server, {"model": "nano", "messages": message(records[0], f"file:{path.name}")})
    for found in (sent.json(), named.json()):
        assert found["choices"][0]["message"]["content"] == expected.choices[0].message.content


def big_png():
    file = io.BytesIO()
    Image.new("L", (2000, 1000)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-4o"}, 404, "nano"),
        ({"temperature": 0.7}, 400, "temperature"),
        ({"n": 2}, 400, "n:"),
        ({"tools": [{"type": "function"}]}, 400, "tools: this server does not do that"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort: this server does not do that"),
        ({"max_tokens": 100_000}, 400, "256"),
        ({"vitos": {"plan": "guess"}}, 400, "plan"),
        ({"messages": []}, 400, "messages"),
        ({"url": "https://example.com/a.png"}, 400, "not fetched"),
        ({"url": "file:../../etc/passwd"}, 400, "no such file"),
        ({"url": "file:/etc/passwd"}, 400, "no such file"),
        ({"url": "attachment:none"}, 400, "attachment"),
        ({"url": "data:image/png;base64,AAAA"}, 400, "image 1"),
        ({"url": "data:image/png;base64,!!"}, 400, "base64"),
        ({"url": big_png()}, 400, "pixels"),
        ({"url": "data:image/png;base64," + "A" * (1 << 20)}, 413, "bytes"),
    ],
)
def test_refusals_say_what_to_do(server, records, change, status, said):
    body = {"model": "nano", "messages": message(records[0], change.pop("url", None)), **change}
    answer = post(server, body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_token_health_models_and_metrics(server, client, records):
    assert post(server, {}, token="wrong").status_code == 401
    assert httpx.get(f"{server}/metrics").status_code == 401
    assert httpx.get(f"{server}/health").json()["status"] == "ok"
    assert [model.id for model in client.models.list()] == ["nano"]
    client.chat.completions.create(model="nano", messages=message(records[0]))
    text = httpx.get(f"{server}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert 'vitos_requests_total{outcome="answered"}' in text
    assert "vitos_kept_ratio_count" in text


def test_a_full_queue_gets_429_and_all_others_an_answer(server, records):
    body = {"model": "nano", "messages": message(records[0])}
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(post(server, body).status_code)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) == {200, 429}
    health = httpx.get(f"{server}/health").json()
    assert (health["running"], health["waiting"]) == (0, 0)


def test_the_question_of_a_client_that_goes_away_is_given_up(server, records):
    body = {"model": "nano", "messages": message(records[0]), "stream": True}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while httpx.get(f"{server}/health").json()["running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert httpx.get(f"{server}/health").json()["running"] == 0


def test_dicom_with_a_window(client):
    data = pytest.importorskip("pydicom.data", reason="needs the extra dicom")
    content = base64.b64encode(Path(data.get_testdata_file("CT_small.dcm")).read_bytes()).decode()
    address = {"url": f"data:application/dicom;base64,{content}", "select": "window=40,400"}
    parts = [{"type": "image_url", "image_url": address}, {"type": "text", "text": "What is it?\nA. cyst\nB. mass"}]
    answer = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": parts}])
    (image,) = answer.model_extra["vitos"]["images"]
    assert "DICOM" in image
    assert "window 40,400" in image
