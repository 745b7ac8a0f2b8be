"""A prompt that is longer than the model's context is refused before anything runs."""

from dataclasses import replace

import pytest
from tests.driven import up_to

from vitos.engines.base import Sampling
from vitos.eval.conditions import EvalSet, Settings, control_conditions
from vitos.eval.run import AskedModel, run_models
from vitos.eval.store import EvalFolder
from vitos.policy.types import Query


def longer(record, words):
    return replace(record, id="long", question=record.question + " lung" * words)


def test_ask_names_both_numbers(warm_policy, phantom_records):
    record = longer(phantom_records[0], 9000)
    scan = warm_policy.encode(record.image_paths[0])
    with pytest.raises(ValueError, match=r"the prompt has \d{4,5} tokens, but the model's context is 4096: shorten"):
        warm_policy.ask(scan, record.question, limits=up_to(4))


def test_the_answer_must_fit_as_well(warm_policy, phantom_records):
    record = phantom_records[0]
    query = Query(warm_policy.encode(record.image_paths[0]), record.question)
    prompt = warm_policy.branches.reason_prompt(query)
    room = 4096 - len(prompt)
    with pytest.raises(ValueError, match=f"an answer of up to {room + 1}, but"):
        warm_policy.engine.sample([prompt], Sampling(room + 1), [[0]])
    with pytest.raises(ValueError, match="context is 4096"):
        next(warm_policy.engine.stream(prompt, Sampling(4096)))


def test_an_evaluation_leaves_it_out_by_name(warm_policy, phantom_records, tmp_path):
    records = (phantom_records[0], longer(phantom_records[1], 9000))
    model = AskedModel(name="m", path="", conditions=control_conditions(controls=False), load=lambda: warm_policy)
    settings = Settings(max_localization_tokens=8, max_reasoning_tokens=8)
    run_models([model], [EvalSet("a", records)], settings, tmp_path)
    ((row,), folder) = EvalFolder(tmp_path).left_out("m"), EvalFolder(tmp_path)
    assert row["id"] == "long"
    assert "context is 4096" in row["reason"]
    assert set(folder.images("m", "a")) == {phantom_records[0].id}
