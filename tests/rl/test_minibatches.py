"""Several optimiser steps per update, the forms of the loss in an update, and what is checked at the first one."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from vitos.config.options import ConfigError
from vitos.core.prompt import Prompt
from vitos.rl.callbacks import read_metrics
from vitos.rl.config import DualStreamConfig
from vitos.rl.first_update import blank, image_effect
from vitos.rl.rollout import roll_out
from vitos.rl.schedule import stage_at

JOINT = {"schedule": "joint", "localization_steps": 1, "reasoning_steps": 1, "questions_per_step": 4}


def gradients(make_trainer, policy, folder, step=0, **options):
    """Gradients of the parts of an update, without a step between them, and the figures."""
    trainer = make_trainer(policy, folder, **JOINT | options)
    model, seen = trainer.model, []

    def take(*_):
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()

    _, stage = stage_at(trainer.stages, step)
    done = trainer.update.run(model, trainer.train_dataset[:4], stage, step, take)
    take()
    return seen, done.metrics, trainer


def test_parts_of_an_update_make_up_the_whole(make_trainer, warm_policy, clone_policy, tmp_path):
    """Dr. GRPO divides by the number of completions, so that two halves of an update average to it."""
    (whole,), _, _ = gradients(make_trainer, clone_policy(warm_policy), tmp_path / "a", loss="dr_grpo")
    halves, metrics, _ = gradients(
        make_trainer, clone_policy(warm_policy), tmp_path / "b", loss="dr_grpo", minibatches=2
    )
    assert len(halves) == 2
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, gradient, rtol=1e-3, atol=1e-6 * largest)
    assert any(not torch.allclose(halves[0][n], whole[n], rtol=0.1) for n in whole)
    assert metrics["drift_kl/localization"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", ["cispo", "grpo", "dr_grpo", "gspo"])
def test_first_update_of_every_form(loss, make_trainer, warm_policy, clone_policy, tmp_path):
    """On policy CISPO has the default's gradient, GSPO that of GRPO, and Dr. GRPO's is a multiple of the default's."""
    other = {"cispo": "token_mean", "gspo": "grpo", "dr_grpo": "token_mean", "grpo": "gspo"}[loss]
    alone = {"schedule": "localization-only", "localization_steps": 2}
    (found,), _, _ = gradients(make_trainer, clone_policy(warm_policy), tmp_path / "a", loss=loss, **alone)
    (expected,), _, _ = gradients(make_trainer, clone_policy(warm_policy), tmp_path / "b", loss=other, **alone)
    a, b = (torch.cat([g.flatten() for g in part.values()]).double() for part in (found, expected))
    factor = float(a @ b / (b @ b))
    assert float((a - factor * b).norm() / a.norm()) < 1e-4
    if loss == "dr_grpo":
        assert 0.1 < factor < 1  # tokens written ÷ tokens allowed
    else:
        assert factor == pytest.approx(1, rel=1e-4)


def test_every_minibatch_is_a_step_and_later_ones_are_off_policy(make_trainer, warm_policy, clone_policy, tmp_path):
    options = {"schedule": "localization-only", "localization_steps": 2, "questions_per_step": 4, "save_steps": 1}
    make_trainer(clone_policy(warm_policy), tmp_path, minibatches=2, **options).train()
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert {int(value["step"]) for value in state.values()} == {4}
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["mismatch_kl/localization"] < 1e-6 < row["drift_kl/localization"]


def test_a_resumed_run_with_minibatches_equals_the_whole(make_trainer, warm_policy, clone_policy, tmp_path):
    options = {
        "schedule": "joint",
        "localization_steps": 1,
        "reasoning_steps": 2,
        "questions_per_step": 4,
        "minibatches": 2,
        "loss": "gspo",
        "entropy_beta": 0.01,
        "save_steps": 1,
    }

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    make_trainer(clone_policy(warm_policy), tmp_path / "a", **options).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(clone_policy(warm_policy), tmp_path / "b", [Stop()], **options).train()
    make_trainer(clone_policy(warm_policy), tmp_path / "b", **options).train(resume_from_checkpoint=True)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert len(a) == len(b) == 3
    for one, other in zip(a, b, strict=True):
        assert one["entropy/localization"] > 0
        assert {k: v for k, v in one.items() if not k.startswith(("seconds/", "memory/"))} == {
            k: v for k, v in other.items() if not k.startswith(("seconds/", "memory/"))
        }


def test_a_process_needs_a_question_for_every_step(tmp_path):
    with pytest.raises(ConfigError, match=r"minibatches: must not exceed train\.questions_per_step \(4\)"):
        DualStreamConfig(output_dir=str(tmp_path), questions_per_step=4, minibatches=5, use_cpu=True)


# --- entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_unmodified_model(nano, picture, hf_inputs, temperature):
    text, image = "<image>What is it?\nA. cyst\nB. mass", picture(64, 40)
    (visual,) = nano.encode([image])
    ids = torch.tensor(nano.tokenizer("it is a mass")["input_ids"])
    prompt = nano.build_prompt(text, [visual])
    from vitos.engines.torch_engine import TorchEngine

    scores = TorchEngine(nano, head_tokens=3).score([prompt], [[ids, ids[:2]]], temperature, entropy=True)
    logits = nano.model(**hf_inputs(nano, text, [image], extra_ids=ids.tolist())).logits[0, -len(ids) - 1 : -1]
    logits = logits.double().index_fill(-1, torch.tensor(nano.banned_token_ids), float("-inf")) / temperature
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropies[0].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.entropies[1, :2].double(), expected[:2], rtol=1e-4, atol=1e-4)
    assert (scores.entropies[1, 2:] == 0).all()
    parameters = [p for p in nano.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(scores.entropies[0].sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is not None and theirs.any():
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3 * float(theirs.abs().max()))


# --- the first update ------------------------------------------------------------------------------------------------


def rolled(trainer):
    """A batch of rollouts of the trainer's first questions."""
    from vitos.engines.base import Sampling
    from vitos.rl.rewards import RewardWeights
    from vitos.rl.rollout import RolloutOptions

    options = RolloutOptions(
        num_localizations=2, num_reasonings=2, localize=Sampling(24, 1.4), reason=Sampling(14, 1.4), seed=3
    )
    records = trainer.train_dataset[:2]
    scans = trainer.update.scans.get(records)
    return roll_out(trainer.policy, records, scans, 0, options, RewardWeights())


def test_a_blank_image_changes_the_log_probabilities(make_trainer, warm_policy, clone_policy, tmp_path):
    trainer = make_trainer(clone_policy(warm_policy), tmp_path)
    batch = rolled(trainer)
    effect = image_effect(trainer.policy.engine, trainer.accelerator, batch, 1.4)
    assert effect.change > 0.01
    assert effect.gap < 1e-4 < effect.blank_gap
    assert effect.problem == ""
    # The same by hand: sampled log-probabilities against those behind an image of zeros.
    prompt, siblings = batch.reason_prompts[0], [r.completion for r in batch.groups[0].reasonings[0]]
    assert not blank(prompt).embeddings.any()
    scores = trainer.policy.engine.score([blank(prompt)], [[c.token_ids for c in siblings]], 1.4)
    sampled = torch.cat([c.logprobs for c in siblings])
    assert effect.blank_gap == pytest.approx(float((scores.logprobs[scores.mask] - sampled).abs().mean()), rel=1e-4)


def test_training_without_the_image_is_refused(make_trainer, warm_policy, clone_policy, monkeypatch, tmp_path):
    """A policy whose visual tokens never reach the model."""
    policy = clone_policy(warm_policy)
    trainer = make_trainer(policy, tmp_path)
    score = policy.engine.score
    monkeypatch.setattr(policy.engine, "score", lambda prompts, *a, **k: score([blank(p) for p in prompts], *a, **k))
    with pytest.raises(ValueError, match=r"a blank image leaves every log-probability as it is.*'train/"):
        trainer.train()


def test_a_sampler_without_the_image_is_refused(make_trainer, warm_policy, clone_policy, monkeypatch, tmp_path):
    policy = clone_policy(warm_policy)
    trainer = make_trainer(policy, tmp_path, max_mismatch_kl=None)
    sample = policy.engine.sample

    def blind(prompts: list[Prompt], sampling, seeds, span=None, prefixes=None):
        return sample([blank(p) for p in prompts], sampling, seeds)

    monkeypatch.setattr(policy.engine, "sample", blind)
    with pytest.raises(ValueError, match="the sampler does not see the images"):
        trainer.train()


def test_a_sampler_of_another_distribution_stops_the_run(
    make_trainer, warm_policy, clone_policy, monkeypatch, tmp_path
):
    def trainer(folder, **options):
        policy = clone_policy(warm_policy)
        made, sample = make_trainer(policy, folder, **options), policy.engine.sample

        def off(*args, **kwargs):
            rows = sample(*args, **kwargs)
            return [[replace(c, logprobs=c.logprobs - 0.4) for c in row] for row in rows]

        monkeypatch.setattr(policy.engine, "sample", off)
        return made

    before = {n: p.clone() for n, p in warm_policy.backbone.model.named_parameters()}
    stopped = trainer(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"mismatch_kl/localization is 0\.09.*more than train\.max_mismatch_kl = 0\.05"
    ):
        stopped.train()
    assert all(torch.equal(p, before[n]) for n, p in stopped.policy.backbone.model.named_parameters())
    trainer(tmp_path / "b", max_mismatch_kl=None).train()
    trainer(tmp_path / "c", max_mismatch_kl=0.2).train()
