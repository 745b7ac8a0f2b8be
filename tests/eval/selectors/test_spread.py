"""Greedy orders against brute force: every candidate tried at every step, determinants by numpy."""

import numpy as np
import pytest

from vitos.eval.selectors.diversity import conditional_kernel
from vitos.eval.selectors.spread import determinant_order, max_min_order


def points(seed, n=9, width=3):
    return np.random.default_rng(seed).normal(size=(n, width))


def distances(x):
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


@pytest.mark.parametrize("seed", range(10))
def test_max_min_by_trying_all(seed):
    distance = distances(points(seed))
    n = len(distance)
    order = max_min_order(distance)
    assert sorted(order) == list(range(n))
    isolation = [min(distance[i, j] for j in range(n) if j != i) for i in range(n)]
    assert isolation[order[0]] == max(isolation)
    for step in range(1, n):
        gap = {c: min(distance[c, s] for s in order[:step]) for c in range(n) if c not in order[:step]}
        assert gap[order[step]] == max(gap.values())


@pytest.mark.parametrize("seed", range(10))
def test_max_min_greedy_reaches_half_of_the_optimum_from_any_start(seed):
    """The known guarantee of the greedy order: half of the best smallest distance of any subset."""
    from itertools import combinations

    distance = distances(points(seed, n=8, width=2))

    def smallest(subset):
        return min(distance[a, b] for a, b in combinations(subset, 2))

    for count in (2, 3, 4, 5):
        best = max(smallest(s) for s in combinations(range(8), count))
        for first in range(8):
            assert smallest(max_min_order(distance, first)[:count]) >= best / 2 - 1e-12


def test_last_points_come_only_when_no_other_is_left():
    last = np.array([True, False] * 4 + [False])
    order = max_min_order(distances(points(1)), 1, last)
    assert not last[order[:5]].any()
    assert last[order[5:]].all()


@pytest.mark.parametrize("seed", range(10))
def test_determinants_by_trying_all(seed):
    x = points(seed, n=8, width=12)
    kernel = x @ x.T
    order = determinant_order(kernel)
    for step in range(len(kernel)):
        values = {}
        for candidate in set(range(len(kernel))) - set(order[:step].tolist()):
            subset = [*order[:step], candidate]
            values[candidate] = np.linalg.det(kernel[np.ix_(subset, subset)])
        assert values[order[step]] == pytest.approx(max(values.values()), rel=1e-8)
    np.testing.assert_array_equal(determinant_order(kernel, 4), order[:4])


def test_more_items_than_dimensions_go_on_by_length():
    x = points(3, n=9, width=2)
    kernel = x @ x.T
    order = determinant_order(kernel)
    assert sorted(order) == list(range(9))
    rest = np.diag(kernel)[order[2:]]
    assert (np.diff(rest) <= 0).all()


def test_relevance_decides_where_all_tokens_are_alike_in_their_unlikeness():
    """With S the identity det(L_S) is the product of r², so the most relevant tokens win."""
    scores = np.array([0.1, -0.3, 0.7, 0.2, 0.65])
    np.testing.assert_array_equal(determinant_order(conditional_kernel(np.eye(5), scores)), [2, 4, 3, 0, 1])


def test_of_two_equal_tokens_only_one_is_taken():
    unit = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    order = determinant_order(conditional_kernel(unit @ unit.T, np.array([1.0, 0.9, 0.1, 0.0])))
    assert order[:2].tolist() == [0, 2]
