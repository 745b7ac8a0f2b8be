"""What `VllmSampler` does around vLLM, which is a stand-in here; `plugin/test_real_sampler.py` runs the real one."""

import copy
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import SampleRequest, VllmEngine
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


# --- sleeping --------------------------------------------------------------------------------------------------------


class SleepyLLM:
    """As vLLM on a GPU: memory that sleeps can neither be written to nor used, and level 2 loses the weights.

    Its log of calls is `calls`. The model is a copy that the torch engine samples from.
    """

    def __init__(self, backbone, **options):
        self.backbone = copy.copy(backbone)
        self.backbone.model = copy.deepcopy(backbone.model)
        self.llm_engine, self.options = self, options
        self.calls, self.asleep, self.waiting = [], set(), []

    def sleep(self, level):
        assert not self.asleep
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            for weight in self.backbone.model.parameters():
                weight.data.zero_()

    def wake_up(self, tags):
        self.calls += [f"wake {tag}" for tag in tags]
        self.asleep -= set(tags)

    def apply_model(self, function):
        assert "weights" not in self.asleep
        self.calls.append("write weights")
        return [function(self)]

    def load_weights(self, weights):
        own, written = dict(self.named_parameters()), set()
        for name, weight in weights:
            own[name].data.copy_(weight)
            written.add(name)
        return written

    def named_parameters(self):
        return self.backbone.model.named_parameters()

    def reset_encoder_cache(self):
        self.calls.append("empty encoder cache")

    def reset_prefix_cache(self):
        self.calls.append("empty prefix cache")
        return True

    def add_request(self, name, prompt, parameters):
        self.waiting.append((name, prompt, parameters))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        assert not self.asleep
        self.calls.append("step")
        name, prompt, given = self.waiting.pop()
        sampling = Sampling(given.max_tokens, given.temperature)
        ((c,),) = TorchEngine(self.backbone).sample([prompt["prompt"]], sampling, [[given.seed]])
        ids = c.token_ids.tolist()
        rows = [{t: SimpleNamespace(logprob=p)} for t, p in zip(ids, c.logprobs.tolist(), strict=True)]
        completion = SimpleNamespace(token_ids=ids, logprobs=rows, finish_reason="stop" if c.finished else "length")
        return [SimpleNamespace(finished=True, request_id=name, outputs=[completion])]


@pytest.fixture
def sleepy(monkeypatch, nano):
    """`sleepy(level, can_sleep)`: an engine on a fake vLLM, and that vLLM."""
    from vitos.engines.vllm import sampler as module

    backbone, made = copy.copy(nano), []
    backbone.model = copy.deepcopy(nano.model).float()
    vllm, prompts = ModuleType("vllm"), ModuleType("vitos.engines.vllm.plugin.prompts")
    vllm.SamplingParams = SimpleNamespace
    vllm.LLM = lambda **options: made.append(SleepyLLM(backbone, **options)) or made[-1]
    prompts.engine_input = lambda prompt: {"prompt": prompt}
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, prompts.__name__, prompts)
    monkeypatch.setattr(module, "_keep_linear_weights", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made[0].calls.append("give back memory"))

    def make(level, can_sleep):
        monkeypatch.setattr(module, "_can_sleep", lambda: can_sleep)
        return VllmEngine(backbone, VllmSampler(backbone, "float32", sleep_level=level)), made[0]

    return make


WRITE = ["write weights", "empty encoder cache", "empty prefix cache"]
UPDATES = {
    level: [*WRITE, "step", f"sleep {level}"]
    + 2 * ["give back memory", "wake weights", *WRITE, "give back memory", "wake kv_cache", "step", f"sleep {level}"]
    for level in (1, 2)
} | {0: 3 * [*WRITE, "step"]}


@pytest.mark.parametrize(("level", "can_sleep"), [(0, True), (1, True), (2, True), (2, False)])
def test_calls_of_vllm_in_order_while_it_sleeps_between_rollouts(level, can_sleep, sleepy):
    """Weights are woken, written, and only then is the cache woken; the fake fails at any use of what sleeps."""
    engine, fake = sleepy(level, can_sleep)
    prompt = engine.backbone.build_prompt("What is a cyst?", [])
    said = []
    for step in range(3):
        engine.refresh()
        (row,) = engine.sample([prompt], Sampling(6, 1.0), [[step]])
        ((c,),) = TorchEngine(engine.backbone).sample([prompt], Sampling(6, 1.0), [[step]])
        assert row[0].token_ids.tolist() == c.token_ids.tolist()  # of the weights of this update
        said.append(row[0].text)
        engine.release()
        with torch.no_grad():
            for weight in engine.backbone.model.parameters():
                weight.mul_(1.1)
    calls = [call for call, before in zip(fake.calls, ["", *fake.calls], strict=False) if call != before]
    assert calls == UPDATES[level if can_sleep else 0]
    assert fake.options.get("enable_sleep_mode", False) == (level > 0 and can_sleep)
    assert len(set(said)) > 1
