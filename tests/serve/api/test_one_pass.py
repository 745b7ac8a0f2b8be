"""Plan one_pass over HTTP, with a head of `vitos distill`: alone, together and streamed, against `ask`."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from vitos.policy.vlm import SparseVLM


@pytest.fixture(scope="module")
def policy(headed):
    return SparseVLM.from_pretrained(headed, device="cpu")


@pytest.fixture(scope="module")
def address(policy, serving):
    with serving(policy, name="nano") as address:
        yield address


def messages(record, image_part):
    text = record.question.removeprefix("<image>")
    return [{"role": "user", "content": [image_part(record.image_paths[0]), {"type": "text", "text": text}]}]


def test_the_answers_are_those_of_ask(policy, address, asker, phantoms, image_part):
    ask = asker(address)

    def asked(record):
        return ask(messages(record, image_part), vitos={"plan": "one_pass"})

    with ThreadPoolExecutor(3) as pool:
        found = [answer.json() for answer in pool.map(asked, phantoms)]
    for record, answer in zip(phantoms, found, strict=True):
        scan = policy.encode(record.image_paths[0], plan="one_pass")
        alone = policy.ask(scan, record.question, plan="one_pass")
        evidence = answer["vitos"]
        assert evidence["plan"] == "one_pass"
        assert evidence["text"] == alone.reasoning.completion.text
        assert evidence["answer"] == alone.answer
        assert evidence["boxes"] == [list(box.as_tuple()) for box in alone.boxes]
        assert evidence["kept_tokens"] == alone.kept.count == 16


def test_budgets_boxes_and_streams(address, asker, phantoms, image_part):
    ask = asker(address)
    sent = messages(phantoms[0], image_part)
    assert ask(sent, vitos={"plan": "one_pass", "budget": 0.1}).json()["vitos"]["kept_tokens"] == 6
    boxed = ask(sent, vitos={"plan": "one_pass", "boxes": [[0, 0, 0.5, 0.25]]}).json()["vitos"]
    assert (boxed["kept_tokens"], boxed["boxes"]) == (8, [[0, 0, 0.5, 0.25]])
    whole = ask(sent, vitos={"plan": "one_pass"}).json()
    with httpx.stream(
        "POST",
        f"{address}/v1/chat/completions",
        json={"model": "nano", "messages": sent, "stream": True, "vitos": {"plan": "one_pass"}},
        timeout=60,
    ) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    last = next(event["vitos"] for event in reversed(events) if event.get("vitos"))
    assert last["text"] == whole["vitos"]["text"]
    assert last["kept_tokens"] == 16


def test_without_a_head_the_plan_is_refused(serving, asker, phantoms, image_part):
    with serving(SparseVLM.from_pretrained("nano", device="cpu"), name="nano") as address:
        refused = asker(address)(messages(phantoms[0], image_part), vitos={"plan": "one_pass"})
    assert refused.status_code == 400
    assert "vitos distill" in refused.json()["error"]["message"]
