"""Draws without replacement against enumeration of all of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.plackett_luce import draw_order, order_entropies, order_logprobs

small = st.lists(st.floats(-3, 3), min_size=1, max_size=5)


def by_definition(scores, order):
    """The product of exp(s) over the sum of what is left, in plain numbers."""
    left, probability = list(range(len(scores))), 1.0
    for index in order:
        probability *= math.exp(scores[index]) / sum(math.exp(scores[i]) for i in left)
        left.remove(index)
    return probability


@given(scores=small, data=st.data())
def test_probabilities_are_those_of_the_definition_and_sum_to_one(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    tensor, total = torch.tensor(scores, dtype=torch.float64), 0.0
    for order in itertools.permutations(range(len(scores)), count):
        found = float(order_logprobs(tensor, torch.tensor(order)).sum().exp())
        assert found == pytest.approx(by_definition(scores, order), rel=1e-9)
        total += found
    assert total == pytest.approx(1.0, rel=1e-9)


def test_draws_have_these_probabilities():
    scores, rng, count = torch.tensor([0.5, -1.0, 1.5, 0.0]), np.random.default_rng(0), 2
    seen = dict.fromkeys(itertools.permutations(range(4), count), 0)
    draws = 20_000
    for _ in range(draws):
        seen[tuple(draw_order(scores, count, torch.from_numpy(rng.random(4))).tolist())] += 1
    for order, number in seen.items():
        p = by_definition(scores.tolist(), order)
        assert abs(number / draws - p) < 5 * math.sqrt(p * (1 - p) / draws), order


@given(scores=st.lists(st.floats(-2, 2), min_size=2, max_size=5), data=st.data())
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(scores, data):
    """Σ p R ∇log p over all draws against finite differences of Σ p R, for a reward of the set."""
    count = data.draw(st.integers(1, len(scores)))
    orders = list(itertools.permutations(range(len(scores)), count))
    sets = {frozenset(order) for order in orders}
    rewards = dict(zip(sorted(sets, key=sorted), np.random.default_rng(len(orders)).random(len(sets)), strict=True))

    def expected(values):
        return sum(by_definition(values, order) * rewards[frozenset(order)] for order in orders)

    tensor = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for order in orders:
        logprob = order_logprobs(tensor, torch.tensor(order)).sum()
        surrogate = surrogate + logprob.detach().exp() * rewards[frozenset(order)] * logprob
    (found,) = torch.autograd.grad(surrogate, tensor)
    for i in range(len(scores)):
        up, down = list(scores), list(scores)
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        assert float(found[i]) == pytest.approx((expected(up) - expected(down)) / 2e-5, abs=1e-6)


@given(scores=small, data=st.data())
def test_entropies_are_those_of_what_is_left(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    order = list(data.draw(st.permutations(range(len(scores)))))[:count]
    found = order_entropies(torch.tensor(scores, dtype=torch.float64), torch.tensor(order)).tolist()
    for step, entropy in enumerate(found):
        weights = [math.exp(scores[i]) for i in range(len(scores)) if i not in order[:step]]
        shares = [weight / sum(weights) for weight in weights]
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-9)


def test_all_of_them_and_large_scores_are_finite():
    scores = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    logprobs = order_logprobs(scores, torch.tensor([0, 2, 1]))
    assert logprobs.tolist() == [0.0, 0.0, 0.0]
    logprobs.sum().backward()
    assert torch.isfinite(scores.grad).all()
    with pytest.raises(ValueError, match="cannot draw 4 of 3"):
        draw_order(scores, 4, torch.rand(3))
