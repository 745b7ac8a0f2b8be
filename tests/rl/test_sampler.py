"""Training on rollouts of another engine, with a stand-in for vLLM."""

import json

import pytest
import torch
from tests.engines.fake_sampler import FakeSampler

from vitos.policy.vlm import SparseVLM
from vitos.rl import sampler as room


@pytest.fixture
def policy():
    return SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.float32)


@pytest.fixture
def fakes(monkeypatch):
    """All stand-ins that trainers make; `fakes.options` are theirs."""
    made = []

    def make(backbone, dtype, **options):
        made.append(FakeSampler(backbone, dtype, **options))
        return made[-1]

    monkeypatch.setattr(room, "VllmSampler", make)
    return made


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(policy):
    return {n: p.detach().clone() for n, p in policy.backbone.model.named_parameters()}


def test_a_sampler_that_agrees_trains_the_same_weights(policy, fakes, make_trainer, samples, tmp_path):
    # Not Adam, which turns the rounding of a gradient near zero into a step of any size.
    plain = {"optim": "sgd", "learning_rate": 0.5}
    make_trainer(policy, tmp_path / "a", sampler="vllm", **plain).train()
    other = SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.float32)
    make_trainer(other, tmp_path / "b", **plain).train()
    (fake,) = fakes
    assert fake.loads == 2  # once for each update
    assert samples(tmp_path / "a", 2) == samples(tmp_path / "b", 2)
    start = weights(SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.float32))
    first, second = weights(policy), weights(other)
    apart = sum(float((first[n] - second[n]).square().sum()) for n in start) ** 0.5
    moved = sum(float((first[n] - start[n]).square().sum()) for n in start) ** 0.5
    assert moved > 0.1
    assert apart < 1e-4 * moved
    first = rows(tmp_path / "a")[0]
    assert first["sampler/logprob_gap"] < 1e-4
    assert first["mismatch_kl/localization"] < 1e-6
    assert "sampler/logprob_gap" not in rows(tmp_path / "b")[0]


def test_a_sampler_that_differs_is_measured_from_the_first_update(policy, fakes, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "VllmEngine", lambda *a, **k: room_engine(*a, tolerance=10.0))
    make_trainer(policy, tmp_path, sampler="vllm", sampler_options={"noise": 0.02}).train()
    first, second = rows(tmp_path)[:2]
    assert first["mismatch_kl/localization"] > 1e-6
    assert second["mismatch_kl/reasoning"] > 1e-6


def room_engine(backbone, sampler, tolerance):
    from vitos.engines.vllm.engine import VllmEngine

    return VllmEngine(backbone, sampler, tolerance)


def test_a_sampler_that_misses_weights_ends_the_run(policy, fakes, make_trainer, tmp_path):
    from vitos.engines.vllm.engine import WeightsError

    with pytest.raises(WeightsError, match="reached the sampler"):
        make_trainer(policy, tmp_path, sampler="vllm", sampler_options={"lost": "norm"}).train()


def test_adapters_are_refused(policy, fakes, make_trainer, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="no adapters yet"):
        make_trainer(policy, tmp_path, sampler="vllm", lora=peft.LoraConfig(target_modules="all-linear"))


def test_options_of_vllm_need_vllm(policy, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="sampler_options"):
        make_trainer(policy, tmp_path, sampler_options={"max_model_len": 512})


def test_the_real_vllm(policy, make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    options = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16, "block_size": 32}
    start = weights(policy)
    make_trainer(policy, tmp_path, sampler="vllm", sampler_options=options).train()
    first, second = rows(tmp_path)[:2]
    assert (first["step"], second["step"]) == (1, 2)
    for row, branch in ((first, "localization"), (second, "reasoning")):
        assert row["sampler/tensors"] == len(start)
        assert row["sampler/logprob_gap"] < 1e-4
        assert 0 <= row[f"mismatch_kl/{branch}"] < 1e-6
        assert row[f"clipped/{branch}"] == 0
    assert max(float((w - start[n]).abs().max()) for n, w in weights(policy).items()) > 1e-3
