"""Each form of the loss against its paper's formula, pair by pair and token by token, and finite differences."""

from typing import get_args, get_type_hints

import pytest
import torch

from vitos.config.options import DualStreamOptions
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.objectives import LOSSES

LOW, HIGH, LIMIT = 0.2, 0.28, 9
FORMS = sorted(LOSSES)


def case(seed, rows=4, width=6, repeats=3, spread=0.6):
    """Random completions in float64 of unlike lengths, ratios beyond both clips, and garbage on the padding."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    new = -3 * torch.rand(rows, width, generator=draw, dtype=torch.float64)
    old, reference = new + spread * random(rows, width), new + 0.5 * random(rows, width)
    lengths = torch.tensor([width, *(1 + (2 * row + seed) % width for row in range(1, rows))])
    mask = torch.arange(width)[None] < lengths[:, None]
    for tensor in (new, old, reference):
        tensor[~mask] = -1e30
    return new.requires_grad_(), old, reference, random(rows, repeats), mask


def literal(form, new, old, reference, advantages, mask, beta=0.0, weights=None):
    """The mean over the repeats of every completion, one scalar at a time.

    `weights`: for CISPO the weights of the tokens, which are constants.
    """
    sequences = []  # (objectives of the tokens, length) of each repeat
    for i in range(new.shape[0]):
        at = [t for t in range(new.shape[1]) if mask[i, t]]
        together = torch.exp(sum(new[i, t] - old[i, t] for t in at) / len(at))
        for a in advantages[i]:
            terms = []
            for t in at:
                ratio = together if form == "gspo" else torch.exp(new[i, t] - old[i, t])
                if form == "cispo":
                    fixed = torch.exp(weights[i, t] - old[i, t]) if weights is not None else ratio.detach()
                    term = min(float(fixed), 1 + HIGH) * a * new[i, t]
                else:
                    term = torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
                d = reference[i, t] - new[i, t]
                terms.append(term - beta * (torch.exp(d) - d - 1))
            sequences.append(sum(terms) if form not in ("grpo", "gspo") else sum(terms) / len(at))
    tokens = int(mask.sum()) * advantages.shape[1]
    count = {"token_mean": tokens, "cispo": tokens, "dr_grpo": LIMIT * len(sequences)}.get(form, len(sequences))
    return -sum(sequences) / count


def ours(form, new, old, reference, advantages, mask, beta=0.0, **options):
    inputs = LossInputs(
        logprobs=new,
        old_logprobs=old,
        mask=mask,
        positive=advantages.clamp(min=0).sum(1),
        negative=advantages.clamp(max=0).sum(1),
        reference_logprobs=reference if beta else None,
        repeats=advantages.shape[1],
    )
    count = advantages.numel()
    denominator = LOSSES[form].denominator(inputs.tokens, count, LIMIT)
    settings = {"clip_low": LOW, "clip_high": HIGH, "kl_beta": beta, "denominator": denominator}
    return policy_loss(inputs, form=form, **settings | options)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_one_pass_equals_the_literal_repeats_with_their_gradient(form, seed, beta):
    """G × K pairs: O_i run once with A⁺ and A⁻, against O_i run K times."""
    tensors = case(seed)
    out, expected = ours(form, *tensors, beta), literal(form, *tensors, beta)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(loss, tensors[0])[0] for loss in (out.loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)
    assert (found[~tensors[4]] == 0).all()
    assert out.clipped > 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form):
    new, old, reference, advantages, mask = case(5)
    fixed = new.detach().clone()
    (gradient,) = torch.autograd.grad(ours(form, new, old, reference, advantages, mask, 0.2).loss, new)
    step = 1e-6
    for i, t in mask.nonzero().tolist():
        values = []
        for sign in (1, -1):
            moved = fixed.clone()
            moved[i, t] += sign * step
            values.append(literal(form, moved, old, reference, advantages, mask, 0.2, weights=fixed))
        assert float(gradient[i, t]) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_on_policy_gradients_of_all_forms(form):
    """One minibatch, nothing clipped: token means have the default's gradient, the others a known multiple."""
    new, _, reference, advantages, mask = case(1)
    found, default = (
        torch.autograd.grad(ours(name, new, new.detach(), reference, advantages, mask).loss, new)[0]
        for name in (form, "token_mean")
    )
    if LOSSES[form].unit == "token":
        torch.testing.assert_close(found, default, rtol=1e-12, atol=1e-14)
    lengths = mask.sum(1, keepdim=True)
    tokens, rows = int(mask.sum()), len(mask)
    factor = {"token": 1.0, "completion": tokens / (rows * lengths), "limit": tokens / (rows * LIMIT)}
    torch.testing.assert_close(found, default * factor[LOSSES[form].unit], rtol=1e-12, atol=1e-14)


def test_equal_lengths_make_sequence_and_token_mean_equal():
    new, old, reference, advantages, _ = case(2)
    mask = torch.ones_like(new, dtype=torch.bool)
    tensors = (new.clamp(min=-3).detach().requires_grad_(), old.clamp(min=-3), reference.clamp(min=-3))
    losses = {f: ours(f, *tensors, advantages, mask, denominator=None).loss for f in ("grpo", "token_mean")}
    torch.testing.assert_close(losses["grpo"], losses["token_mean"])


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form):
    new, old, reference, advantages, mask = case(7)
    whole = ours(form, new, old, reference, advantages, mask, 0.3)
    denominator = LOSSES[form].denominator(3 * int(mask.sum()), advantages.numel(), LIMIT)
    parts = [
        ours(form, new[i], old[i], reference[i], advantages[i], mask[i], 0.3, denominator=denominator)
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    assert sum(p.clipped for p in parts) == whole.clipped


@pytest.mark.parametrize("form", FORMS)
def test_another_engine_s_tokens_are_corrected_by_a_cut_weight(form):
    """Engines that agree need none; where they differ, weights are constants below the cap and nothing is clipped."""
    new, old, reference, advantages, mask = case(4, spread=1.5)
    same = new.detach().clone()
    plain, capped = (
        ours(form, new, same, reference, advantages, mask, 0.3, importance_cap=cap) for cap in (None, 2.0)
    )
    torch.testing.assert_close(*(torch.autograd.grad(out.loss, new)[0] for out in (plain, capped)))
    out = ours(form, new, old, reference, advantages, mask, importance_cap=1.05)
    (gradient,) = torch.autograd.grad(out.loss, new)
    log_ratio = torch.where(mask, new - old, 0.0).detach()
    lengths = mask.sum(1, keepdim=True)
    if form == "gspo":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    unit = 1.0 / lengths if LOSSES[form].unit == "completion" else 1.0
    denominator = LOSSES[form].denominator(3 * int(mask.sum()), advantages.numel(), LIMIT)
    expected = -log_ratio.exp().clamp(max=1.05) * advantages.sum(1, keepdim=True) * unit * mask / denominator
    torch.testing.assert_close(gradient, expected)
    assert out.clipped == int(((log_ratio.exp() > 1.05) & mask).sum()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_an_entropy_term_is_averaged_as_the_objective_is(form):
    new, old, _, advantages, mask = case(3)
    entropies = torch.rand(new.shape, dtype=torch.float64).requires_grad_()
    inputs = LossInputs(
        logprobs=new,
        old_logprobs=old,
        mask=mask,
        positive=advantages.clamp(min=0).sum(1) * 0,
        negative=advantages.clamp(max=0).sum(1) * 0,
        entropies=entropies,
        repeats=3,
    )
    denominator = LOSSES[form].denominator(inputs.tokens, advantages.numel(), LIMIT)
    out = policy_loss(inputs, form=form, clip_low=LOW, clip_high=HIGH, entropy_beta=0.5, denominator=denominator)
    per = [entropies[i][mask[i]] for i in range(len(mask))]
    sums = [float(p.detach().mean() if LOSSES[form].unit == "completion" else p.detach().sum()) for p in per]
    assert float(out.loss) == pytest.approx(-0.5 * 3 * sum(sums) / denominator)
    assert out.entropy == pytest.approx(float(entropies.detach()[mask].sum()))
    (gradient,) = torch.autograd.grad(out.loss, entropies)
    assert (gradient[mask] < 0).all()  # more entropy, less loss


def test_words_of_a_recipe_are_the_rows_of_the_table():
    assert set(get_args(get_type_hints(DualStreamOptions)["loss"])) == set(LOSSES)


def test_a_constant_normaliser_needs_to_be_told():
    with pytest.raises(ValueError, match="dr_grpo needs a denominator"):
        ours("dr_grpo", *case(0), denominator=None)
