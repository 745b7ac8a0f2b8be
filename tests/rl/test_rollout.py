"""Rollouts of a briefly trained tiny model: seeds, sparse prompts, rewards and figures, each worked out again."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from vitos.core.geometry import TokenGrid
from vitos.core.sparsify import Fusion
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.policy.branches import Branches
from vitos.policy.plans import Limits
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.metrics import rollout_metrics, stack
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

PLAN = RolloutOptions(
    num_localizations=3, num_reasonings=2, localize=Sampling(24, 1.4), reason=Sampling(14, 1.4), seed=5
)
WEIGHTS = RewardWeights(format=0.25, iou=1.0, accuracy=2.0, feedback=0.5)


def rolled(policy, records, step=0, plan=PLAN, weights=WEIGHTS, **more):
    return roll_out(policy, records, ScanStore(policy).get(records), step, plan, weights, **more)


@pytest.fixture(scope="module")
def batch(warm_policy, phantom_records):
    """Six questions; some localizations can be read and some cannot, some answers are right and some wrong."""
    found = rolled(warm_policy, phantom_records[:6])
    parsed = [r.response.evidence_parsed for g in found.groups for r in g.localizations]
    assert 0 < sum(parsed) < len(parsed)
    for term in ("accuracy", "sparse_accuracy", "sparse_format"):
        assert 0 < stack(found.groups, term).mean() < 1, term
    return found


def completions(group):
    return [r.completion for r in group.localizations] + [r.completion for row in group.reasonings for r in row]


def same(a, b, exact=True):
    """Two groups have the same tokens (and log-probabilities) everywhere."""
    pairs = list(zip(completions(a), completions(b), strict=True))
    if not all(torch.equal(x.token_ids, y.token_ids) for x, y in pairs):
        return False
    if exact:
        return all(torch.equal(x.logprobs, y.logprobs) for x, y in pairs)
    return all(torch.allclose(x.logprobs, y.logprobs, atol=1e-4) for x, y in pairs)


def test_shapes_and_order(batch, phantom_records):
    assert [group.record for group in batch.groups] == list(phantom_records[:6])
    assert len(batch.localize_prompts) == 6
    assert len(batch.reason_prompts) == 6 * 3
    for group in batch.groups:
        assert (len(group.localizations), [len(row) for row in group.reasonings]) == (3, [2, 2, 2])
    assert stack(batch.groups, "accuracy").shape == (6, 3)
    assert stack(batch.groups, "sparse_accuracy").shape == (6, 3, 2)
    for prompt in batch.localize_prompts:
        assert int(prompt.is_visual.sum()) == 64


def test_same_seed_same_rollouts_bit_for_bit(batch, warm_policy, phantom_records):
    again = rolled(warm_policy, phantom_records[:6])
    for a, b in zip(batch.groups, again.groups, strict=True):
        assert same(a, b)
        np.testing.assert_array_equal(a.rewards.localization, b.rewards.localization)
        np.testing.assert_array_equal(a.rewards.reasoning, b.rewards.reasoning)
    for a, b in zip(batch.reason_prompts, again.reason_prompts, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.embeddings, b.embeddings)


@pytest.mark.parametrize("change", [{"step": 1}, {"plan": replace(PLAN, seed=6)}])
def test_another_step_or_seed_is_another_draw(change, batch, warm_policy, phantom_records):
    other = rolled(warm_policy, phantom_records[:2], **change)
    assert not all(same(a, b, exact=False) for a, b in zip(batch.groups, other.groups, strict=False))


def test_siblings_differ(batch):
    texts = [[c.text for c in completions(group)[:3]] for group in batch.groups]
    assert any(len(set(row)) > 1 for row in texts)
    answers = [tuple(r.completion.text for r in row) for g in batch.groups for row in g.reasonings]
    assert any(a != b for a, b in answers)


def test_order_and_company_of_questions_do_not_matter(batch, warm_policy, phantom_records):
    order = [4, 1, 0]
    other = rolled(warm_policy, [phantom_records[i] for i in order])
    for group, i in zip(other.groups, order, strict=True):
        assert same(group, batch.groups[i], exact=False)


@pytest.mark.parametrize("fusion", [Fusion("none"), Fusion("weighted", 0.2)])
def test_sparse_prompts_hold_the_tokens_of_their_own_boxes(fusion, warm_policy, phantom_records):
    policy = warm_policy.with_spec(fusion=fusion)
    found = rolled(policy, phantom_records[:6])
    seen = 0
    for p, group in enumerate(found.groups):
        embeddings = group.query.scan.visuals[0].embeddings
        dense = policy.branches.reason_prompt(group.query)
        for i, rollout in enumerate(group.localizations):
            prompt = found.reason_prompts[3 * p + i]
            inside = [cell for cell in range(64) if any(overlaps(cell, box) for box in rollout.response.boxes)]
            if not inside:
                assert group.kept[i].fallback
                assert torch.equal(prompt.embeddings, embeddings)
                continue
            seen += 1
            assert not group.kept[i].fallback
            text = ~dense.is_visual
            text[dense.is_visual.nonzero()[inside, 0]] = True  # text and the tokens inside
            assert torch.equal(prompt.position_ids, dense.position_ids[:, text])
            assert torch.equal(prompt.input_ids, dense.input_ids[text])
            assert prompt.next_position == dense.next_position
            expected = embeddings[inside] if fusion.mode == "none" else fused(embeddings, inside, fusion.beta)
            torch.testing.assert_close(prompt.embeddings, expected)
    assert seen > 0


def overlaps(cell, box):
    row, col = divmod(cell, 8)
    return col < 8 * box.x2 and col + 1 > 8 * box.x1 and row < 8 * box.y2 and row + 1 > 8 * box.y1


def fused(tokens, inside, beta):
    """docs/method.md, section 3, `weighted`: one outside token at a time."""
    gathered = {k: [] for k in inside}
    for d in sorted(set(range(len(tokens))) - set(inside)):
        cosines = [float(torch.cosine_similarity(tokens[d], tokens[k], dim=0)) for k in inside]
        best = max(cosines)
        gathered[inside[cosines.index(best)]].append((max(best, 0.0), tokens[d]))
    rows = []
    for k in inside:
        total = sum(w for w, _ in gathered[k])
        mixed = sum(w * d for w, d in gathered[k]) / total if total > 0 else tokens[k]
        rows.append((1 - beta) * tokens[k] + beta * mixed if total > 0 else tokens[k])
    return torch.stack(rows)


def test_rewards_have_cross_feedback_in_both_branches(batch):
    partner_right = partner_wrong = False
    for group in batch.groups:
        gold = group.record.answer
        for i, o in enumerate(group.localizations):
            acc = float(o.response.answer == gold)
            (box,) = group.record.boxes if len(group.record.boxes) == 1 else (None,)
            for j, s in enumerate(group.reasonings[i]):
                sparse = float(s.response.answer == gold)
                iou = group.rewards.terms["iou"][i]
                if box is not None and len(o.response.boxes) == 1:
                    assert iou == pytest.approx(o.response.boxes[0].iou(box))
                own = 0.25 * o.response.well_formed + 1.0 * iou + 2.0 * acc
                assert group.rewards.localization[i, j] == pytest.approx(own + 0.5 * sparse)
                own = 0.25 * s.response.well_formed + 2.0 * sparse
                assert group.rewards.reasoning[i, j] == pytest.approx(own + 0.5 * acc)
                partner_right |= bool(sparse) and bool(acc)
                partner_wrong |= sparse != acc
    assert partner_right
    assert partner_wrong


def test_without_feedback_the_partner_does_not_count(batch, warm_policy, phantom_records):
    alone = rolled(warm_policy, phantom_records[:6], weights=replace(WEIGHTS, feedback=0.0))
    for group in alone.groups:
        assert (np.ptp(group.rewards.localization, axis=1) == 0).all()
    assert any(np.ptp(group.rewards.localization, axis=1).any() for group in batch.groups)


def test_dense_plan_reasons_on_all_tokens_and_is_no_fallback(warm_policy, phantom_records):
    found = rolled(warm_policy, phantom_records[:2], plan=replace(PLAN, dense=True))
    assert all(int(prompt.is_visual.sum()) == 64 for prompt in found.reason_prompts)
    figures = rollout_metrics(found.groups)
    assert (figures["kept_ratio"], figures["fallback_rate"]) == (1.0, 0.0)


def test_localizer_writes_the_boxes_and_the_policy_answers(batch, warm_policy, clone_policy, phantom_records):
    """The policy's last layer is negated: it writes another text, but not in the localization branch."""
    other = clone_policy(warm_policy)
    with torch.no_grad():
        other.backbone.model.model.language_model.norm.weight.neg_()
    found = rolled(other, phantom_records[:6], localizer=warm_policy)
    for a, b in zip(found.groups, batch.groups, strict=True):
        assert [r.completion.text for r in a.localizations] == [r.completion.text for r in b.localizations]
        assert [r.completion.text for r in a.reasonings[0]] != [r.completion.text for r in b.reasonings[0]]


def test_metrics_by_hand(batch):
    figures = rollout_metrics(batch.groups)
    first = [r for g in batch.groups for r in g.localizations]
    second = [r for g in batch.groups for row in g.reasonings for r in row]
    gold = {id(r): g.record.answer for g in batch.groups for row in [g.localizations, *g.reasonings] for r in row}

    def share(flags):
        return sum(flags) / len(flags)

    kept = []
    for rollout in first:
        inside = sum(any(overlaps(cell, box) for box in rollout.response.boxes) for cell in range(64))
        kept.append(inside / 64 if inside else 1.0)
    ious = [iou for g in batch.groups for iou in g.rewards.terms["iou"]]
    limits = {id(r): 24 for r in first} | {id(r): 14 for r in second}
    expected = {
        "reward/localization": np.mean([g.rewards.localization for g in batch.groups]),
        "reward/reasoning": np.mean([g.rewards.reasoning for g in batch.groups]),
        "accuracy/localization": share([r.response.answer == gold[id(r)] for r in first]),
        "accuracy/sparse": share([r.response.answer == gold[id(r)] for r in second]),
        "kept_ratio": np.mean(kept),
        "fallback_rate": share([not r.response.boxes for r in first]),
        "parse_rate": share([len(r.response.boxes) > 0 for r in first]),
        "no_answer_rate": share([r.response.answer is None for r in second]),
        "boxes_per_response": sum(len(r.response.boxes) for r in first) / 18,
        "whole_image_rate": share([any(b.area > 0.9 for b in r.response.boxes) for r in first]),
        "truncated_rate": share(
            [
                len(r.completion.token_ids) == limits[id(r)] and int(r.completion.token_ids[-1]) != 2
                for r in first + second
            ]
        ),
        "tokens/localization": sum(len(r.completion.token_ids) for r in first) / 18,
        "tokens/reasoning": sum(len(r.completion.token_ids) for r in second) / 36,
        "group_std/localization": np.mean([np.std(g.rewards.localization) for g in batch.groups]),
        "group_std/reasoning": np.mean([np.std(g.rewards.reasoning) for g in batch.groups]),
        "zero_std_rate": share(
            [len({*g.rewards.localization.ravel()}) == len({*g.rewards.reasoning.ravel()}) == 1 for g in batch.groups]
        ),
        "reward/format": share([r.response.well_formed for r in first]),
        "reward/sparse_format": share([r.response.well_formed for r in second]),
        "reward/iou": np.mean(ious),
        "iou": np.mean(ious),
    }
    assert figures == pytest.approx(expected)


def test_evidence_that_cannot_be_read_is_a_counted_fallback(warm_policy, phantom_records):
    short = replace(PLAN, localize=Sampling(3, 1.0))
    found = rolled(warm_policy, phantom_records[:2], plan=short)
    figures = rollout_metrics(found.groups)
    assert (figures["fallback_rate"], figures["parse_rate"], figures["kept_ratio"]) == (1.0, 0.0, 1.0)
    assert all(int(prompt.is_visual.sum()) == 64 for prompt in found.reason_prompts)


def test_questions_without_gold_boxes_have_no_iou(warm_policy, phantom_records):
    figures = rollout_metrics(rolled(warm_policy, [replace(r, boxes=None) for r in phantom_records[:2]]).groups)
    assert np.isnan(figures["iou"])
    assert "reward/iou" not in figures


def test_under_plan_gather_both_branches_go_on_behind_one_dense_pass(warm_policy, phantom_records, monkeypatch):
    """Reasoning sees the kept tokens' keys of the dense image; scoring names the sampled log-probabilities again."""
    policy, records = warm_policy.with_spec(plan="gather"), phantom_records[:2]
    visual, call = [], policy.backbone.model.forward
    token = policy.backbone.visual_token_id
    monkeypatch.setattr(
        policy.backbone.model,
        "forward",
        lambda **k: visual.append(int((k["input_ids"] == token).sum())) or call(**k),
    )
    found = rolled(policy, records)
    assert sum(visual) == 2 * 64  # each image once, for all its localizations and reasonings
    monkeypatch.undo()
    sparse = [prompt for prompt in found.reason_prompts if prompt.hidden is not None]
    assert sparse
    prompts = iter(found.reason_prompts)
    for group in found.groups:
        assert group.query.scan.prefix is None  # not held until the update
        for kept, row in zip(group.kept, group.reasonings, strict=True):
            prompt = next(prompts)
            assert int(prompt.is_visual.sum()) == 64
            assert prompt.cached_length == len(prompt) - int((~kept.mask).sum())
            with torch.no_grad():
                scores = policy.engine.score([prompt], [[r.completion.token_ids for r in row]], temperature=1.4)
            for rollout, logprobs in zip(row, scores.logprobs, strict=True):
                length = len(rollout.completion.token_ids)
                torch.testing.assert_close(logprobs[:length], rollout.completion.logprobs, rtol=0, atol=1e-3)


class ToldBranches(Branches):
    evidence: ClassVar[dict[str, str]] = {}

    def read_localization(self, query, completion):
        text = f"<think>x</think><evidence>{self.evidence[query.question]}</evidence><answer>A</answer>"
        return super().read_localization(query, replace(completion, text=text))


class Told(SparseVLM):
    """Writes what is given, by question."""

    @property
    def branches(self):
        return ToldBranches(self.backbone, self.spec)


def test_under_plan_coarse_reasoning_gets_what_the_plan_gives_it(warm_policy, phantom_records, monkeypatch):
    """A box, no box, and one smaller than a cell of the reduced image: without a second localization, the whole."""
    records = [replace(r, question=f"{r.question} {i}") for i, r in enumerate(phantom_records[:3])]
    boxes = ("[[0.25, 0.25, 0.63, 0.76]]", "[]", "[[0.3, 0.3, 0.35, 0.35]]")
    policy = Told(warm_policy.backbone, warm_policy.spec).with_spec(plan="coarse")
    monkeypatch.setattr(ToldBranches, "evidence", dict(zip((r.question for r in records), boxes, strict=True)))
    scans = ScanStore(policy).get(records)
    found = roll_out(policy, records, scans, 0, PLAN, WEIGHTS)
    assert all(int(prompt.is_visual.sum()) == 16 for prompt in found.localize_prompts)
    prompts = [found.reason_prompts[i : i + 3] for i in range(0, 9, 3)]

    steps = policy.plan.steps(policy.branches, [Query(scans[0], records[0].question)], Limits(), Stopwatch())
    request = next(steps)
    expected = steps.send([r.completion for r in found.groups[0].localizations[:1]])
    assert (request.branch, expected.branch) == ("localize", "reason")
    scanned = zip(ScanStore(warm_policy).get(records), records, strict=True)
    whole = [warm_policy.branches.reason_prompt(Query(scan, record.question)) for scan, record in scanned]
    for group, own, prompt in zip(found.groups, prompts, (expected.prompts[0], *whole[1:]), strict=True):
        assert group.kept[0].grid == TokenGrid.single(8, 8)
        for got, kept in zip(own, group.kept, strict=True):
            assert torch.equal(got.input_ids, prompt.input_ids)
            assert torch.equal(got.position_ids, prompt.position_ids)
            assert torch.equal(got.embeddings, prompt.embeddings)
            assert kept.fallback == (group is not found.groups[0])
            assert kept.count == len(got.embeddings) == (64 if kept.fallback else 20)
    assert rollout_metrics(found.groups)["fallback_rate"] == pytest.approx(2 / 3)


def test_reduced_images_are_not_read_from_a_cache(warm_policy):
    with pytest.raises(ValueError, match="plan coarse begins with reduced images"):
        ScanStore(warm_policy.with_spec(plan="coarse"), cache=object())
