"""ToMe and VisionZip's merging against plain loops."""

import math

import numpy as np
import pytest
import torch

from vitos.backbones.attention import Attention
from vitos.eval.selectors.merging import bipartite_merge
from vitos.eval.selectors.visionzip import visionzip_merge


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def tome_by_loops(tokens, count, in_order):
    """Groups as (place, list of members), merged pair by pair."""
    groups = [(i, [i]) for i in range(len(tokens))]

    def mean(members):
        return [sum(tokens[m][d] for m in members) / len(members) for d in range(len(tokens[0]))]

    while len(groups) > count:
        values = [mean(members) for _, members in groups]
        edges = []
        for a in range(0, len(groups), 2):
            likeness = {b: cosine(values[a], values[b]) for b in range(1, len(groups), 2)}
            best = max(likeness, key=lambda b: likeness[b])
            edges.append((likeness[best], a, best))
        edges.sort(key=lambda e: -e[0])
        limit = math.ceil(len(groups) / 2) if in_order else len(groups) // 2
        pairs = edges[: min(limit, len(groups) - count)]
        for _, a, b in pairs:
            groups[b][1].extend(groups[a][1])
        gone = {a for _, a, _ in pairs}
        falling = [a for _, a, _ in edges if a not in gone] + list(range(1, len(groups), 2))
        groups = [groups[i] for i in (sorted(falling) if in_order else falling)]
    return {place: (sorted(members), mean(members)) for place, members in groups}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [1, 3, 6, 11, 12, 13])
@pytest.mark.parametrize("in_order", [False, True])
def test_tome_by_loops(seed, count, in_order):
    tokens = torch.from_numpy(np.random.default_rng(seed).normal(size=(13, 4))).float()
    places, matrix = bipartite_merge(tokens, count, in_order=in_order)
    expected = tome_by_loops(tokens.double().tolist(), count, in_order)
    assert places.tolist() == list(expected)
    for row, (members, value) in zip(matrix, expected.values(), strict=True):
        assert row.nonzero()[:, 0].tolist() == members
        torch.testing.assert_close(row @ tokens, torch.tensor(value).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(matrix.sum(0) > 0, torch.ones(13, dtype=torch.bool))  # no token is lost


def test_tome_refuses_impossible_counts():
    for count in (0, 13):
        with pytest.raises(ValueError, match=r"count must be in 1\.\.12"):
            bipartite_merge(torch.randn(12, 3), count)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [1, 2, 7, 13, 20])
def test_visionzip_by_loops(seed, count):
    rng = np.random.default_rng(seed)
    received, keys = rng.random(20), rng.normal(size=(2, 20, 5))
    seen = Attention(*map(torch.from_numpy, (received, keys, received)))
    mask, matrix = visionzip_merge(seen, count)
    contextual = round(count * 10 / 64) if count > 1 else 0
    dominant = sorted(range(20), key=lambda i: -received[i])[: count - contextual]
    rest = [i for i in range(20) if i not in dominant]
    step = len(rest) // contextual if contextual else 0
    targets = [rest[k * step] for k in range(contextual)]
    assert np.flatnonzero(mask).tolist() == sorted(dominant + targets)
    absorbed = {t: [] for t in targets}
    for token in rest:
        if token not in targets and targets:
            absorbed[max(targets, key=lambda t: cosine(keys.mean(0)[token], keys.mean(0)[t]))].append(token)
    for row, place in zip(matrix, sorted(dominant + targets), strict=True):
        expected = torch.zeros(20)
        expected[place] = 1
        members = absorbed.get(place, [])
        expected[members] = 1 / max(1, len(members))
        torch.testing.assert_close(row, expected)
