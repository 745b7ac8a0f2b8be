"""Fusion against the formulas of docs/method.md, section 3, as plain loops; the keep rule against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid, View
from vitos.core.sparsify import Fusion, KeepRule, Kept, fuse, fusion_matrix, select


def fuse_by_loops(tokens, mask, mode, beta):
    """The formulas token by token, in plain Python floats."""
    tokens, kept, outside = tokens.tolist(), [], []
    for index, keep in enumerate(mask.tolist()):
        (kept if keep else outside).append(index)

    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in tokens[a])) * math.sqrt(sum(v * v for v in tokens[b]))
        return sum(u * v for u, v in zip(tokens[a], tokens[b], strict=True)) / norms

    absorbed = {k: [] for k in kept}
    if mode != "none":
        for d in outside:
            absorbed[max(kept, key=lambda k: cosine(d, k))].append(d)
    out = []
    for k, followers in absorbed.items():
        weights = [max(cosine(d, k), 0.0) if mode == "weighted" else 1.0 for d in followers]
        total = sum(weights)
        mixed = [sum(w * tokens[d][i] for w, d in zip(weights, followers, strict=True)) for i in range(len(tokens[k]))]
        if mode == "mean":
            out.append([(own + m) / (1 + len(followers)) for own, m in zip(tokens[k], mixed, strict=True)])
        elif total > 0:
            out.append([(1 - beta) * own + beta * m / total for own, m in zip(tokens[k], mixed, strict=True)])
        else:
            out.append(tokens[k])
    return torch.tensor(out, dtype=torch.float32)


def draw_case(seed, count=12, hidden=3):
    """Few dimensions, so that negative cosines and kept tokens without followers are common."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.normal(size=(count, hidden))).float()
    mask = torch.from_numpy(rng.random(count) < 0.3)
    mask[int(rng.integers(count))] = True
    return tokens, mask


@pytest.mark.parametrize("mode", ["none", "mean", "weighted"])
@pytest.mark.parametrize("seed", range(20))
def test_fusion_against_loops(mode, seed):
    tokens, mask = draw_case(seed, hidden=2 + seed % 4)
    beta = (0.0, 0.15, 0.5, 1.0)[seed % 4]
    (fused,) = fuse([tokens], mask, Fusion(mode, beta))
    assert fused.shape == (int(mask.sum()), tokens.shape[1])  # fusion adds no token
    torch.testing.assert_close(fused, fuse_by_loops(tokens, mask, mode, beta), rtol=1e-5, atol=1e-6)


def test_cases_hold_what_makes_fusion_hard():
    """Among the cases above: kept tokens without followers, and followers of negative cosine only."""
    lonely = negative = 0
    for seed in range(20):
        tokens, mask = draw_case(seed, hidden=2 + seed % 4)
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        best, owner = (unit[~mask] @ unit[mask].T).max(-1) if bool((~mask).any()) else (torch.ones(1), torch.zeros(1))
        lonely += len(owner.unique()) < int(mask.sum())
        negative += bool((best < 0).any())
    assert lonely >= 3
    assert negative >= 3


def test_weighted_by_hand():
    """k = (1, 0); followers (2, 0) of cosine 1 and (3, 3) of cosine √½; (−1, 0) has weight 0."""
    tokens = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 3.0], [-1.0, 0.0]])
    (fused,) = fuse([tokens], torch.tensor([True, False, False, False]), Fusion("weighted", 0.2))
    w = math.sqrt(0.5)
    expected = [0.8 + 0.2 * (2 + 3 * w) / (1 + w), 0.2 * 3 * w / (1 + w)]
    assert fused[0].tolist() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from(["none", "mean", "weighted"]), st.floats(0, 1))
def test_rows_of_the_matrix_sum_to_one(seed, mode, beta):
    tokens, mask = draw_case(seed)
    matrix = fusion_matrix(tokens, mask, Fusion(mode, beta))
    assert matrix.shape == (int(mask.sum()), len(mask))
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["none", "mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keep_all_changes_no_bit(mode, dtype):
    tokens = torch.randn(9, 5, dtype=dtype)
    (fused,) = fuse([tokens], torch.ones(9, dtype=torch.bool), Fusion(mode))
    assert fused.dtype == dtype
    assert torch.equal(fused, tokens)


@pytest.mark.parametrize("mode", ["mean", "weighted"])
def test_bfloat16_in_bfloat16_out(mode):
    tokens, mask = draw_case(3, count=40, hidden=8)
    (fused,) = fuse([tokens.bfloat16()], mask, Fusion(mode))
    assert fused.dtype == torch.bfloat16
    expected = fuse_by_loops(tokens.bfloat16().float(), mask, mode, 0.15)
    torch.testing.assert_close(fused.float(), expected, rtol=0.01, atol=0.01)


def test_kept_tokens_that_absorb_nothing_change_no_bit():
    tokens = torch.tensor([[1.0, 0.1], [0.3, 1.7], [-1.0, -1.0]])
    (fused,) = fuse([tokens], torch.tensor([True, True, False]), Fusion("weighted"))
    assert torch.equal(fused, tokens[:2])


def test_streams_are_fused_as_the_embeddings_are():
    """Who goes to whom is decided once, by the embeddings; extra streams follow."""
    tokens, mask = draw_case(5)
    extra = torch.randn(len(tokens), 7)
    _, fused = fuse([tokens, extra], mask, Fusion("mean"))
    torch.testing.assert_close(fused, fusion_matrix(tokens, mask, Fusion("mean")) @ extra)
    assert fused.shape[1] == 7


@pytest.mark.parametrize("mode", ["none", "mean", "weighted"])
def test_unfit_masks_are_errors(mode):
    with pytest.raises(ValueError, match=r"\(4,\) for 5 visual tokens"):
        fuse([torch.randn(5, 2)], torch.ones(4, dtype=torch.bool), Fusion(mode))
    with pytest.raises(ValueError, match="no visual token is kept"):
        fuse([torch.randn(5, 2)], torch.zeros(5, dtype=torch.bool), Fusion(mode))


@pytest.mark.parametrize("wrong", [{"mode": "median"}, {"beta": -0.1}, {"beta": 1.1}, {"beta": math.nan}])
def test_wrong_fusion(wrong):
    with pytest.raises(ValueError, match="fusion"):
        Fusion(**wrong)


@pytest.mark.parametrize("wrong", [{"margin": -1}, {"min_tokens": 0}, {"other_images": -1}])
def test_wrong_keep_rule(wrong):
    with pytest.raises(ValueError, match="must be >= 0"):
        KeepRule(**wrong)


# --- the keep rule --------------------------------------------------------------------------------------------------


def test_without_a_box_the_whole_image_is_used_and_it_shows():
    selection = select(TokenGrid.single(3, 5), [])
    assert selection.fallback
    assert selection.mask.all()
    assert selection.ratio == 1


def test_a_box_over_everything_is_no_fallback():
    selection = select(TokenGrid.single(3, 5), [Box(0, 0, 1, 1)])
    assert not selection.fallback
    assert selection.ratio == 1


def test_selection_is_the_union_of_the_boxes():
    selection = select(TokenGrid.single(4, 4), [Box(0, 0, 0.25, 0.25), Box(0.5, 0.5, 0.75, 1)])
    assert selection.mask.nonzero()[0].tolist() == [0, 10, 14]
    assert selection.ratio == 3 / 16
    assert not selection.fallback


def test_margin_comes_from_the_rule():
    wide = select(TokenGrid.single(4, 4), [Box(0, 0, 0.25, 0.25)], KeepRule(margin=1))
    assert wide.mask.nonzero()[0].tolist() == [0, 1, 4, 5]


coordinates = st.integers(0, 20).map(lambda k: k / 20)


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 40),
    st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), min_size=1, max_size=3),
)  # fmt: skip
def test_min_tokens_are_the_cells_nearest_to_the_boxes(rows, cols, least, corners):
    boxes = [Box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners if a != c and b != d]
    if not boxes:
        return
    grid = TokenGrid.single(rows, cols)
    inside = grid.overlapping(boxes)
    mask = select(grid, boxes, KeepRule(min_tokens=least)).mask
    assert mask[inside].all()
    assert mask.sum() == max(inside.sum(), min(least, rows * cols))

    def distance(token):
        """From the cell's centre to the nearest box, by looking at each box's nearest point."""
        x, y = (token % cols + 0.5) / cols, (token // cols + 0.5) / rows
        return min(math.dist((x, y), (min(max(x, b.x1), b.x2), min(max(y, b.y1), b.y2))) for b in boxes)

    added, left = np.flatnonzero(mask & ~inside), np.flatnonzero(~mask)
    if len(added) and len(left):
        assert max(map(distance, added)) <= min(map(distance, left)) + 1e-12


def test_a_box_in_no_cell_keeps_the_nearest_ones():
    """A grid that leaves out a border, and a box in that border."""
    grid = TokenGrid((View(Rect(0.0, 0.2, 1.0, 1.0), 2, 2),))
    selection = select(grid, [Box(0.6, 0.0, 0.9, 0.1)])
    assert selection.mask.tolist() == [False, True, False, False]
    assert not selection.fallback


def test_kept_ratio_counts_all_views():
    grid = TokenGrid((View(WHOLE_IMAGE, 1, 1), View(WHOLE_IMAGE, 3, 3)))
    assert select(grid, [Box(0.4, 0.4, 0.6, 0.6)]).ratio == 0.2
    assert Kept(TokenGrid.single(1, 2), np.array([True, False])).ratio == 0.5
