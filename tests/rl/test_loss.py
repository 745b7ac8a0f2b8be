"""The loss against the literal formula of docs/method.md, section 9: each O_i repeated K times, token by token."""

import math

import pytest
import torch

from vitos.rl.loss import LossInputs, policy_loss

LOW, HIGH = 0.2, 0.28


def case(seed, rows=3, width=5, repeats=4, spread=0.6):
    """Random completions in float64 with ratios on both sides of both clips, and garbage on the padding."""
    draw = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(rows, width, generator=draw, dtype=torch.float64)
    old = new + spread * torch.randn(rows, width, generator=draw, dtype=torch.float64)
    reference = new + 0.5 * torch.randn(rows, width, generator=draw, dtype=torch.float64)
    advantages = torch.randn(rows, repeats, generator=draw, dtype=torch.float64)
    lengths = [width, *(1 + (seed + row) % width for row in range(1, rows))]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    for tensor in (new, old, reference):
        tensor[~mask] = -1e30
    return new.requires_grad_(), old, reference, advantages, mask


def literal(new, old, reference, advantages, mask, beta):
    """− Σ_i Σ_j Σ_t [min(ρA, clip(ρ)A) − β k3] / (tokens of all repeats)."""
    total, tokens = 0.0, 0
    for i in range(new.shape[0]):
        for j in range(advantages.shape[1]):
            for t in range(new.shape[1]):
                if not mask[i, t]:
                    continue
                ratio, a = torch.exp(new[i, t] - old[i, t]), advantages[i, j]
                total = total + torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
                if beta:
                    d = reference[i, t] - new[i, t]
                    total = total - beta * (torch.exp(d) - d - 1)
                tokens += 1
    return -total / tokens


def loss(new, old, reference, advantages, mask, beta, **options):
    inputs = LossInputs(
        logprobs=new,
        old_logprobs=old,
        mask=mask,
        positive=advantages.clamp(min=0).sum(1),
        negative=advantages.clamp(max=0).sum(1),
        reference_logprobs=reference if beta else None,
        repeats=advantages.shape[1],
    )
    return policy_loss(inputs, clip_low=LOW, clip_high=HIGH, kl_beta=beta, **options)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_literal_repeat_with_its_gradient(seed, beta):
    tensors = case(seed)
    new, old, _, _, mask = tensors
    ratio = (new - old).exp()[mask]
    assert (ratio > 1 + HIGH).any()
    assert (ratio < 1 - LOW).any()
    ours, theirs = loss(*tensors, beta).loss, literal(*tensors, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, new)
    (their_gradient,) = torch.autograd.grad(theirs, new)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-14)
    assert (our_gradient[~mask] == 0).all()
    assert (our_gradient[mask] != 0).any()


def test_on_policy_gradient_is_the_plain_policy_gradient():
    new, _, _, advantages, mask = case(1)
    (gradient,) = torch.autograd.grad(loss(new, new.detach(), None, advantages, mask, 0.0).loss, new)
    expected = -advantages.sum(1, keepdim=True) * mask / (4 * mask.sum())
    torch.testing.assert_close(gradient, expected)


def test_micro_batches_with_a_common_denominator_add_up():
    new, old, reference, advantages, mask = case(7, rows=4)
    whole = loss(new, old, reference, advantages, mask, 0.3)
    tokens = 4 * int(mask.sum())
    parts = [
        loss(new[i], old[i], reference[i], advantages[i], mask[i], 0.3, denominator=tokens)
        for i in (slice(0, 1), slice(1, 4))
    ]
    (gradient,) = torch.autograd.grad(whole.loss, new, retain_graph=True)
    (summed,) = torch.autograd.grad(parts[0].loss + parts[1].loss, new)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(summed, gradient)
    for name in ("tokens", "clipped", "mismatch_kl", "reference_kl"):
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(whole, name))


def test_figures_are_sums_over_tokens():
    new, old, reference, advantages, mask = case(3)
    out = loss(new, old, reference, advantages, mask, 0.1)
    new = new.detach()
    clipped, mismatch, kl = 0, 0.0, 0.0
    for i, t in mask.nonzero().tolist():
        x = float(new[i, t] - old[i, t])
        moved_up = math.exp(x) > 1 + HIGH and bool((advantages[i] > 0).any())
        moved_down = math.exp(x) < 1 - LOW and bool((advantages[i] < 0).any())
        clipped += moved_up or moved_down
        mismatch += math.exp(x) - x - 1
        d = float(reference[i, t] - new[i, t])
        kl += math.exp(d) - d - 1
    assert (out.tokens, out.clipped) == (int(mask.sum()), clipped)
    assert clipped > 0
    assert out.mismatch_kl == pytest.approx(mismatch)
    assert out.reference_kl == pytest.approx(kl)


# --- completions of another engine ----------------------------------------------------------------------------------


def test_importance_weights_give_the_gradient_of_the_policy_itself():
    """The expectation over all tokens of a small vocabulary under another distribution, written out."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=draw, dtype=torch.float64).requires_grad_()
    sampler = (logits.detach() + 0.7 * torch.randn(7, generator=draw, dtype=torch.float64)).log_softmax(-1)
    advantages = torch.randn(7, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((logits.softmax(-1) * advantages).sum(), logits)[0]
    total = 0.0
    for token in range(7):
        inputs = LossInputs(
            logprobs=logits.log_softmax(-1)[token].view(1, 1),
            old_logprobs=sampler[token].view(1, 1),
            mask=torch.ones(1, 1, dtype=torch.bool),
            positive=advantages[token].clamp(min=0)[None],
            negative=advantages[token].clamp(max=0)[None],
        )
        out = policy_loss(inputs, clip_low=LOW, clip_high=HIGH, importance_cap=1e9)
        total = total + sampler[token].exp() * out.loss
        assert out.clipped == 0
    found = torch.autograd.grad(-total, logits)[0]
    torch.testing.assert_close(found, expected)
    uncorrected = torch.autograd.grad((sampler.exp() * advantages * logits.log_softmax(-1)).sum(), logits)[0]
    assert (uncorrected - expected).abs().max() > 0.01  # and without weights it would be another one


def test_importance_weights_are_cut_and_counted():
    new, old, reference, advantages, mask = case(3, spread=2.0)
    out = loss(new, old, reference, advantages, mask, 0.0, importance_cap=2.0)
    weight = (new - old).detach().exp().clamp(max=2.0)
    a = advantages.sum(1, keepdim=True)  # on policy nothing else is clipped
    expected = -(torch.where(mask, weight * a, 0.0)).sum() / (mask.sum() * advantages.shape[1])
    torch.testing.assert_close(out.loss, expected)
    assert out.clipped == int((((new - old).exp() > 2.0) & mask).sum()) > 0
    (gradient,) = torch.autograd.grad(out.loss, new)
    torch.testing.assert_close(gradient, -torch.where(mask, weight * a, 0.0) / (mask.sum() * advantages.shape[1]))


def test_engines_that_agree_need_no_correction():
    new, _, reference, advantages, mask = case(4)
    same = new.detach().clone()
    plain = loss(new, same, reference, advantages, mask, 0.3)
    corrected = loss(new, same, reference, advantages, mask, 0.3, importance_cap=2.0)
    torch.testing.assert_close(corrected.loss, plain.loss)
    for a, b in zip(*(torch.autograd.grad(out.loss, new) for out in (plain, corrected)), strict=True):
        torch.testing.assert_close(a, b)
