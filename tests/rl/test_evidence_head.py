"""Reinforcement of the evidence head: draws, their gradients, and runs that stop and go on."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.prompt import pad_prompts
from vitos.core.sparsify import rectangles
from vitos.engines.base import Sampling
from vitos.policy.spec import HeadRule
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.callbacks import read_metrics
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

AFTER = 2


@pytest.fixture
def policy(warm_policy, clone_policy):
    made = clone_policy(warm_policy)
    torch.manual_seed(1)
    made.backbone.evidence_head = EvidenceHead(made.backbone.model.config.get_text_config().hidden_size, 8)
    return made.with_spec(plan="one_pass", evidence_head=HeadRule(after=AFTER))


def prompts_of(policy, records):
    scans = ScanStore(policy).get(records)
    queries = [Query(scan, record.question) for scan, record in zip(scans, records, strict=True)]
    return queries, [policy.plan.evidence_prompt(policy.branches, query) for query in queries]


def test_draws_are_seeded_each_by_itself_and_greedy_ones_are_the_best(policy, phantom_records):
    queries, prompts = prompts_of(policy, phantom_records[:3])
    together = policy.engine.sample(prompts, Sampling(1, 1.0), [[1, 2]] * 3)
    for prompt, row in zip(prompts, together, strict=True):
        assert [len(set(c.token_ids.tolist())) for c in row] == [16, 16]
        assert row[0].token_ids.tolist() != row[1].token_ids.tolist()
        (alone,) = policy.engine.sample([prompt], Sampling(1, 1.0), [[2]])[0]
        assert alone.token_ids.tolist() == row[1].token_ids.tolist()
    (greedy,) = policy.engine.sample(prompts[:1], Sampling(1), [[0]])[0]
    finding = policy.answer(queries[:1])[0]
    assert set(greedy.token_ids.tolist()) == set(np.flatnonzero(finding.kept.mask))


def test_scores_of_draws_and_their_gradients_are_those_of_the_whole_model(policy, phantom_records):
    """The library's model runs all its layers; what enters layer k goes through the formula, draw by draw."""
    _, prompts = prompts_of(policy, phantom_records[:2])
    temperature = 1.4
    rows = policy.engine.sample(prompts, Sampling(1, temperature), [[5, 6], [7]])
    model, head = policy.backbone.model, policy.backbone.evidence_head
    model.requires_grad_(True)
    weights = [*head.parameters(), *model.model.language_model.layers[:AFTER].parameters()]
    scored = policy.engine.score(prompts, [[c.token_ids for c in row] for row in rows], temperature)
    expected = []
    for prompt, row in zip(prompts, rows, strict=True):
        seen = []
        hook = model.model.language_model.layers[AFTER].register_forward_pre_hook(
            lambda _, a, s=seen: s.append(a[0][0])
        )
        model(**policy.backbone.model_inputs(pad_prompts([replace(prompt, after=None)], 0)))
        hook.remove()
        scores = head(seen[0][prompt.is_visual], seen[0][~prompt.is_visual]) / temperature
        for completion in row:
            left, steps = list(range(len(scores))), []
            for index in completion.token_ids.tolist():
                steps.append(scores[index] - scores[left].logsumexp(0))
                left.remove(index)
            expected.append(torch.stack(steps))
    for index, (steps, completion) in enumerate(zip(expected, itertools.chain(*rows), strict=True)):
        torch.testing.assert_close(scored.logprobs[index], steps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(completion.logprobs, steps.detach(), rtol=1e-4, atol=1e-5)
    coefficients = torch.linspace(-1, 1, scored.logprobs.numel()).view_as(scored.logprobs)
    ours = torch.autograd.grad((scored.logprobs * coefficients).sum(), weights)
    theirs = torch.autograd.grad((torch.stack(expected) * coefficients).sum(), weights)
    assert max(float(g.abs().max()) for g in theirs) > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_rollout_answers_from_the_drawn_cells(policy, phantom_records):
    records = phantom_records[:2]
    options = RolloutOptions(
        num_localizations=2, num_reasonings=2, localize=Sampling(9, 1.4), reason=Sampling(9, 1.4), seed=3
    )
    hidden = [replace(record, boxes=()) for record in records]
    batch = roll_out(policy, hidden, ScanStore(policy).get(records), 0, options, RewardWeights())
    prompts = iter(batch.reason_prompts)
    for group in batch.groups:
        assert np.isnan(group.rewards.terms["iou"]).all()  # no gold boxes are needed
        for rollout, kept in zip(group.localizations, group.kept, strict=True):
            assert set(np.flatnonzero(kept.mask)) == set(rollout.completion.token_ids.tolist())
            assert rollout.response.boxes == rectangles(kept)
            prompt = next(prompts)
            assert prompt.after == AFTER
            assert int(prompt.hidden.sum()) == 64 - 16
    scored = policy.engine.score(
        batch.reason_prompts,
        [[r.completion.token_ids for r in row] for g in batch.groups for row in g.reasonings],
        1.4,
    )
    sampled = [r.completion.logprobs for g in batch.groups for row in g.reasonings for r in row]
    for row, theirs in zip(scored.logprobs, sampled, strict=True):
        torch.testing.assert_close(row[: len(theirs)], theirs, rtol=0, atol=1e-4)


def test_under_glance_a_rollout_answers_from_the_cells_in_the_drawn_ones(policy, phantom_records):
    """Drawn on a grid of 4 x 4 and read in one of 8 x 8: each drawn cell is four, encoded at full resolution."""
    policy = policy.with_spec(plan="glance")
    options = RolloutOptions(
        num_localizations=2, num_reasonings=2, localize=Sampling(9, 1.4), reason=Sampling(9, 1.4), seed=3
    )
    scans = ScanStore(policy).get(phantom_records[:2])
    batch = roll_out(policy, phantom_records[:2], scans, 0, options, RewardWeights())
    prompts = iter(batch.reason_prompts)
    for group in batch.groups:
        for rollout, kept in zip(group.localizations, group.kept, strict=True):
            drawn = np.zeros(16, dtype=bool)
            drawn[rollout.completion.token_ids] = True
            assert drawn.sum() == 4
            certain = np.kron(drawn.reshape(4, 4), np.ones((2, 2))).ravel() > 0
            assert (kept.mask | ~certain).all()
            assert kept.grid.num_tokens == 64
            prompt = next(prompts)
            assert int(prompt.is_visual.sum()) == kept.count < 64
            assert prompt.after is None


def head_of(policy):
    return {name: value.clone() for name, value in policy.backbone.evidence_head.state_dict().items()}


def test_the_head_learns_alone_and_a_resumed_run_is_the_same(make_trainer, policy, phantom_records, tmp_path):
    """Only the head moves; the checkpoints hold it in its own file, and the model without it."""
    options = {"unfrozen_parameters": "evidence_head", "localization_steps": 2, "schedule": "localization-only"}
    records = [replace(record, boxes=()) for record in phantom_records]
    start, again = copy.deepcopy(policy.backbone.evidence_head), SparseVLM(copy.copy(policy.backbone), policy.spec)
    before, weights = head_of(policy), {n: p.clone() for n, p in policy.backbone.model.named_parameters()}
    make_trainer(policy, tmp_path / "whole", records=records, save_steps=1, **options).train()
    assert any(not torch.equal(before[n], v) for n, v in head_of(policy).items())
    assert all(torch.equal(weights[n], p) for n, p in policy.backbone.model.named_parameters())
    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[0]["tokens/localization"] == 16
    assert metrics[0]["kept_ratio"] == 0.25
    assert metrics[0]["clipped/localization"] == 0
    assert metrics[0]["mismatch_kl/localization"] < 1e-6
    folder = tmp_path / "whole" / "model"
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = SparseVLM.from_pretrained(folder, device="cpu")
    assert saved.spec.plan == "one_pass"
    for name, value in head_of(policy).items():
        assert torch.equal(value, head_of(saved)[name])
    # The second half again, from the first checkpoint.
    again.backbone.evidence_head = start
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "first")
    trainer = make_trainer(again, tmp_path / "second", records=records, save_steps=1, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first"))
    for name, value in head_of(policy).items():
        assert torch.equal(value, head_of(again)[name]), name


def test_both_stages_train_head_and_weights(make_trainer, policy, tmp_path):
    before, head = {n: p.clone() for n, p in policy.backbone.model.named_parameters()}, head_of(policy)
    make_trainer(policy, tmp_path).train()
    layers = "model.language_model.layers."
    changed = {n for n, p in policy.backbone.model.named_parameters() if not torch.equal(p, before[n])}
    assert {f"{layers}{i}.mlp.up_proj.weight" for i in range(4)} <= changed
    assert any(not torch.equal(head[n], v) for n, v in head_of(policy).items())


def test_the_head_learns_beside_adapters(make_trainer, policy, tmp_path):
    lora = pytest.importorskip("peft").LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    head = head_of(policy)
    make_trainer(policy, tmp_path, lora=lora).train()
    assert any(not torch.equal(head[n], v) for n, v in head_of(policy).items())
    saved = SparseVLM.from_pretrained(tmp_path / "model", device="cpu")
    for name, value in head_of(policy).items():
        torch.testing.assert_close(value, head_of(saved)[name])
