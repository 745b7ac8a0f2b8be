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


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ["norm"]}])
def test_adapters_are_sampled_as_they_are_trained(policy, fakes, make_trainer, samples, tmp_path, options):
    """The same run with the trained model as its own sampler, and the saved model is the one that was sampled."""
    peft = pytest.importorskip("peft")
    plain = {"optim": "sgd", "learning_rate": 0.5}
    before = weights(policy)
    lora = {"target_modules": ["q_proj", "v_proj"], "r": 4, **options}
    torch.manual_seed(0)  # for the random start of the adapters
    make_trainer(policy, tmp_path / "a", sampler="vllm", lora=peft.LoraConfig(**lora), **plain).train()
    other = SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    make_trainer(other, tmp_path / "b", lora=peft.LoraConfig(**lora), **plain).train()
    assert samples(tmp_path / "a", 2) == samples(tmp_path / "b", 2)
    assert rows(tmp_path / "a")[1]["mismatch_kl/reasoning"] < 1e-6
    assert rows(tmp_path / "a")[0]["sampler/tensors"] == len(before)
    trained = SparseVLM.from_pretrained(tmp_path / "a" / "model", device="cpu", dtype=torch.float32)
    moved = {n for n, w in weights(trained).items() if not torch.equal(w, before[n])}
    assert moved
    assert all("q_proj" in n or "v_proj" in n or ("norm" in n and "modules_to_save" in options) for n in moved)


def test_a_thousand_pushes_leave_the_base_as_it_was(policy):
    """Merging in place and taking out again, as trainers do for vLLM, would have changed it by rounding."""
    peft = pytest.importorskip("peft")
    from vitos.engines.vllm.engine import VllmEngine
    from vitos.rl.adapters import add_adapters

    backbone = policy.backbone
    backbone.model = backbone.model.to(torch.bfloat16)
    add_adapters(policy, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapters = [w for w in backbone.model.parameters() if w.requires_grad]
    base = {n: w.clone() for n, w in backbone.model.named_parameters() if not w.requires_grad}
    engine, sent = VllmEngine(backbone, Counting()), []
    engine._gap = lambda: 0.0
    draw = torch.Generator().manual_seed(0)
    for _ in range(1000):
        with torch.no_grad():
            for weight in adapters:
                weight.add_(0.01 * torch.randn(weight.shape, generator=draw))
        engine.refresh()
        sent.append(engine.sampler.total)
    assert len(set(sent)) > 990  # each push sends other weights
    assert all(torch.equal(w, base[n]) for n, w in backbone.model.named_parameters() if not w.requires_grad)


class Counting:
    """A sampler that adds up what it is sent."""

    def load(self, pushed):
        from vitos.engines.vllm.engine import Received

        arrived = dict(pushed)
        self.total = float(arrived["model.language_model.layers.0.self_attn.q_proj.weight"].sum())
        return Received(len(arrived), ())


@pytest.mark.parametrize("level", [1, 2])
def test_the_sampler_sleeps_during_the_update(policy, fakes, make_trainer, tmp_path, level):
    ballast = 300 << 20
    options = {"sampler": "vllm", "sampler_sleep": level, "sampler_options": {"ballast": ballast}}
    make_trainer(policy, tmp_path, **options).train()
    (fake,) = fakes
    order = [call for call, before in zip(fake.calls, ["", *fake.calls], strict=False) if call != before]
    awake = ["load", "wake kv_cache", "generate", f"sleep {level}"]
    assert order == [*[c for c in awake if "wake" not in c], "wake weights", *awake]
    for row in rows(tmp_path)[:2]:
        assert row["memory/rollout"] - row["memory/update"] > 0.5 * ballast / 2**30
        assert row["seconds/wait"] >= 0


def test_without_sleep_nothing_is_called(policy, fakes, make_trainer, tmp_path):
    make_trainer(policy, tmp_path, sampler="vllm", sampler_sleep=0).train()
    assert set(fakes[0].calls) == {"load", "generate"}


def test_processes_must_fit_engines_that_share_weights(policy, fakes, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size 2 does not divide the 1 processes"):
        make_trainer(policy, tmp_path, sampler="vllm", sampler_options={"tensor_parallel_size": 2})


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
