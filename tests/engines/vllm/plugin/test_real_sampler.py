"""`VllmEngine` with the real vLLM: after weights are pushed in place, both sample and score in the same way."""

import copy
import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tests.driven import up_to
from tests.engines.vllm.plugin import gate
from tests.engines.vllm.plugin.test_gate import TOLERANCE

from vitos.engines.base import Sampling, derive_seed
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import VllmEngine

HOT = Sampling(12, 1.3)
COLD = Sampling(12)


@contextmanager
def sampler_for(backbone):
    from vllm.distributed import cleanup_dist_env_and_memory

    from vitos.engines.vllm.sampler import VllmSampler

    sampler = VllmSampler(backbone, "float32", enforce_eager=True, max_model_len=2048, max_num_seqs=16, block_size=32)
    try:
        yield sampler
    finally:
        sampler.llm.llm_engine.engine_core.shutdown()
        del sampler.llm
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=["qwen2_5_vl, tied", "qwen3_vl", "internvl", "llava, llama, cropped"])
def made(request, vllm):
    """An engine whose backbone's weights may be changed, and prompts: dense, sparse, of two images, and fused."""
    backbone = gate.MODELS[request.param]()
    state = torch.get_rng_state()
    with sampler_for(backbone) as sampler:
        assert torch.equal(torch.get_rng_state(), state)  # vLLM seeds the process, and our random state is put back
        prompts = [gate.torch_says(backbone, gate.CASES[i]).prompt for i in (5, 3, 7, 11)]
        yield SimpleNamespace(backbone=backbone, sampler=sampler, prompts=prompts)


def greedy(engine, prompts):
    return [row[0].token_ids.tolist() for row in engine.sample(prompts, COLD, [[0]] * len(prompts))]


def test_updates_arrive(made):
    """Two rounds: in the second, vLLM's caches have all prompts, computed with the old weights."""
    engine, reference = VllmEngine(made.backbone, made.sampler), TorchEngine(made.backbone)
    before = copy.deepcopy(made.backbone.model.state_dict())
    said = []
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        figures = engine.refresh()
        assert figures["sampler/logprob_gap"] < TOLERANCE
        assert figures["sampler/tensors"] == len(list(made.backbone.model.parameters()))
        said.append(greedy(engine, made.prompts))
        assert said[-1] == greedy(reference, made.prompts)
        assert said[-1] == greedy(engine, made.prompts)  # and from the prefix cache
        with torch.no_grad():
            for weight in made.backbone.model.parameters():
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=draw))
    assert said[0] != said[1] != said[2]
    made.backbone.model.load_state_dict(before)


def test_samples_are_scored_alike(made):
    engine, reference = VllmEngine(made.backbone, made.sampler), TorchEngine(made.backbone)
    seeds = [[derive_seed(p, k) for k in range(4)] for p in range(len(made.prompts))]
    rows = engine.sample(made.prompts, HOT, seeds)
    scores = reference.score(made.prompts, [[c.token_ids for c in row] for row in rows], HOT.temperature)
    flat = [c for row in rows for c in row]
    for index, completion in enumerate(flat):
        ids = completion.token_ids.tolist()
        expected = scores.logprobs[index, : len(ids)]
        torch.testing.assert_close(completion.logprobs, expected, atol=TOLERANCE, rtol=0)
        assert not set(ids) & set(made.backbone.banned_token_ids)
        assert completion.finished == (ids[-1] in made.backbone.stop_token_ids)
        assert not set(ids[:-1]) & set(made.backbone.stop_token_ids)
    again = engine.sample(made.prompts, HOT, seeds)
    assert [c.token_ids.tolist() for row in again for c in row] == [c.token_ids.tolist() for c in flat]
    assert len({tuple(c.token_ids.tolist()) for c in flat}) == len(flat)


def test_a_weight_that_is_not_sent_is_named(made):
    engine = VllmEngine(made.backbone, made.sampler)
    weights = {name: w for name, w in made.backbone.model.named_parameters() if "input_layernorm" not in name}
    received = made.sampler.load(weights.items())
    assert received.tensors == len(weights)
    assert len(received.untouched) == made.backbone.model.config.get_text_config().num_hidden_layers
    assert all("input_layernorm" in name for name in received.untouched)
    engine.refresh()


def test_a_policy_answers_through_it(vllm, phantom_records):
    """With nano's own weights, boxes, kept tokens and answers are those of the torch engine."""
    from vitos.policy.vlm import SparseVLM

    policy = SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.float32)
    asked = [(policy.encode(*record.image_paths), record.question) for record in phantom_records[:3]]
    expected = [policy.ask(scan, question, limits=up_to(64)) for scan, question in asked]
    with sampler_for(policy.backbone) as sampler:
        policy.engine = VllmEngine(policy.backbone, sampler)
        found = [policy.ask(scan, question, limits=up_to(64)) for scan, question in asked]
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.localization.completion.text == ours.localization.completion.text
        assert (theirs.answer, theirs.thought, theirs.boxes) == (ours.answer, ours.thought, ours.boxes)
        assert (theirs.kept.mask == ours.kept.mask).all()
    assert any(not ours.fallback for ours in expected)  # so the second request was a sparse one
