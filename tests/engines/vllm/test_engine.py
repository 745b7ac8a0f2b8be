"""The engine that samples with vLLM, with a stand-in for it; `plugin/test_real_sampler.py` runs the real one."""

import copy

import pytest
import torch
from tests.engines.fake_sampler import FakeSampler

from vitos.engines.base import Sampling, derive_seed
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import VllmEngine, WeightsError


@pytest.fixture
def backbone(nano):
    """A copy of nano in float32, because the tests change its weights."""
    other = copy.copy(nano)
    other.model = copy.deepcopy(nano.model).float()
    return other


@pytest.fixture
def prompts(backbone, picture):
    with torch.no_grad():
        visuals = [backbone.encode([picture(*size)])[0] for size in [(64, 96), (120, 40)]]
    dense = [backbone.build_prompt("<image>What is shown?", [visual]) for visual in visuals]
    return [dense[0], dense[1].sparse([torch.arange(len(dense[1].embeddings)) % 3 == 0])]


HOT = Sampling(6, 1.0)
SEEDS = [[derive_seed(p, k) for k in range(3)] for p in range(2)]


def said(rows):
    return [[(c.token_ids.tolist(), c.text, c.finished) for c in row] for row in rows]


def test_samples_what_the_torch_engine_samples(backbone, prompts):
    engine = VllmEngine(backbone, FakeSampler(backbone))
    got, expected = engine.sample(prompts, HOT, SEEDS), TorchEngine(backbone).sample(prompts, HOT, SEEDS)
    assert said(got) == said(expected)
    for row, other in zip(got, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
            assert a.logprobs.dtype == torch.float32
    assert len({tuple(c.token_ids.tolist()) for row in got for c in row}) > 2


def test_weights_go_over_before_the_first_sample_and_at_every_refresh(backbone, prompts):
    sampler = FakeSampler(backbone)
    engine = VllmEngine(backbone, sampler)
    engine.sample(prompts, HOT, SEEDS)
    engine.sample(prompts, HOT, SEEDS)
    assert sampler.loads == 1
    with torch.no_grad():
        for weight in backbone.model.parameters():
            weight.mul_(1.2)
    figures = engine.refresh()
    assert sampler.loads == 2
    assert figures["sampler/tensors"] == len(list(backbone.model.parameters()))
    assert figures["sampler/logprob_gap"] < 1e-4
    expected = TorchEngine(backbone).sample(prompts, HOT, SEEDS)
    assert said(engine.sample(prompts, HOT, SEEDS)) == said(expected)


def test_a_tensor_that_gets_lost_is_noticed(backbone):
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp"):
        VllmEngine(backbone, FakeSampler(backbone, lost="layers.1.mlp.up")).refresh()


def test_a_weight_that_keeps_its_old_value_is_noticed(backbone):
    """As in vLLM on a CPU, which packs the head of a model with tied weights."""
    with pytest.raises(WeightsError, match="log-probability of one token differs"):
        VllmEngine(backbone, FakeSampler(backbone, unwritten="embed_tokens")).refresh()


def test_no_number_is_no_small_gap(backbone):
    with torch.no_grad():
        next(backbone.model.get_output_embeddings().parameters()).fill_(float("nan"))
    with pytest.raises((WeightsError, ValueError)):
        VllmEngine(backbone, FakeSampler(backbone)).refresh()


def test_times_and_counts_are_checked(backbone, prompts):
    engine = VllmEngine(backbone, FakeSampler(backbone))
    with pytest.raises(ValueError, match="2 prompts but seeds for 1"):
        engine.sample(prompts, HOT, SEEDS[:1])


def test_a_prefix_changes_nothing_and_what_it_cannot_do_is_refused(backbone, prompts):
    """`encode` makes prefixes for the torch engine, but a policy passes them to any engine."""
    engine = VllmEngine(backbone, FakeSampler(backbone))
    prefix = engine.prefix(prompts[0].head(prompts[0].prefix_length))
    assert said(engine.sample(prompts, HOT, SEEDS, prefixes=[prefix, None])) == said(
        engine.sample(prompts, HOT, SEEDS)
    )
    with pytest.raises(ValueError, match="knows no stop strings"):
        engine.sample(prompts, Sampling(6, stop=("a",)), SEEDS)
    hiding = prompts[0].gather([torch.arange(len(prompts[0].embeddings)) < 2])
    with pytest.raises(ValueError, match="cannot hide tokens"):
        engine.sample([hiding], HOT, SEEDS[:1])
