"""What `VllmSampler` does around vLLM, which is a stand-in here; `plugin/test_real_sampler.py` runs the real one."""

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from vitos.engines.vllm.engine import SampleRequest
from vitos.engines.vllm.sampler import VllmSampler, _own_random_state


class FakeEngine:
    """Ends two requests per step, the latest first; a completion is the prompt's first token and the seed."""

    def __init__(self):
        self.waiting = []

    def add_request(self, name, prompt, parameters):
        self.waiting.append((name, prompt, parameters))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        out = [self._output(*self.waiting.pop()) for _ in range(min(2, len(self.waiting)))]
        return [SimpleNamespace(finished=False, request_id=out[0].request_id), *out]

    def _output(self, name, prompt, parameters):
        ids = [prompt["ids"][0], parameters.seed]
        rows = [{token: SimpleNamespace(logprob=-float(token))} for token in ids]
        completion = SimpleNamespace(token_ids=ids, logprobs=rows, finish_reason="stop")
        return SimpleNamespace(finished=True, request_id=name, outputs=[completion])


@pytest.fixture
def converted(monkeypatch):
    """The prompts that were converted for vLLM, in order."""
    seen = []

    def engine_input(prompt):
        seen.append(prompt)
        return {"ids": prompt.input_ids.tolist()}

    vllm, prompts = ModuleType("vllm"), ModuleType("vitos.engines.vllm.plugin.prompts")
    vllm.SamplingParams = SimpleNamespace
    prompts.engine_input = engine_input
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, prompts.__name__, prompts)
    return seen


@pytest.fixture
def sampler():
    made = VllmSampler.__new__(VllmSampler)  # vLLM itself starts in __init__
    made.stop_token_ids, made._numbered, made.siblings = [2], 0, 1
    made.llm = SimpleNamespace(llm_engine=FakeEngine())
    return made


def test_a_prompt_is_converted_once_for_all_its_completions(nano, sampler, converted):
    first, second = nano.build_prompt("What is a cyst?", []), nano.build_prompt("Where?", [])
    twin = nano.build_prompt("What is a cyst?", [])  # equal in every tensor, but another prompt
    rows = [first, second, first, first, twin, second]
    requests = [
        SampleRequest(prompt=prompt, max_tokens=4, temperature=1.0, seed=100 + number)
        for number, prompt in enumerate(rows)
    ]
    for _ in range(2):  # in the second round, requests have new names
        converted.clear()
        done = sampler.generate(requests)
        assert [d.token_ids for d in done] == [[int(p.input_ids[0]), 100 + i] for i, p in enumerate(rows)]
        assert [d.logprobs for d in done] == [[-float(t) for t in d.token_ids] for d in done]
        assert len(converted) == 3
        assert all(a is b for a, b in zip(converted, [first, second, twin], strict=True))


def test_prompts_are_keys_by_identity(nano):
    one, two = nano.build_prompt("What is a cyst?", []), nano.build_prompt("What is a cyst?", [])
    assert one == one
    assert one != two
    assert len({one: 1, two: 2}) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_random_state_is_put_back_even_if_vllm_does_not_start(fails):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def seed():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    try:
        with _own_random_state():
            draw()
            if fails:
                raise MemoryError
    except MemoryError:
        assert fails
    assert draw() == expected


def test_engines_that_share_weights_run_the_requests_of_all(nano, sampler, converted, monkeypatch):
    """Two processes with one request more in the second: both run all, in one order, and keep their own."""
    from vitos.engines.vllm import sampler as module

    prompts = [nano.build_prompt(text, []) for text in ("What is a cyst?", "Where?", "Which?")]
    requests = [
        SampleRequest(prompt=prompt, max_tokens=4, temperature=1.0, seed=100 + i) for i, prompt in enumerate(prompts)
    ]
    sampler.siblings, sampler._group = 2, lambda: "group"
    parts = {}

    def gather(everything, own, group):
        parts[rank] = own
        everything[:] = [parts.get(0, own), parts.get(1, [])]

    done = {}
    for rank, own in ((1, requests[1:]), (0, requests[:1]), (1, requests[1:])):
        monkeypatch.setattr(module.dist, "all_gather_object", gather)
        monkeypatch.setattr(module.dist, "get_rank", lambda group, rank=rank: rank)
        done[rank] = sampler.generate(own)
    assert [d.token_ids[1] for d in done[0]] == [100]
    assert [d.token_ids[1] for d in done[1]] == [101, 102]
