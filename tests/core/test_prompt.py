"""Prompts as plain tensors: dropping tokens, heads, padding. That models agree is shown in backbones/ and engines/."""

from dataclasses import replace

import pytest
import torch

from vitos.core.geometry import TokenGrid
from vitos.core.prompt import Prompt, VisualTokens, pad_prompts
from vitos.core.sparsify import Fusion, fuse

PAD, IMAGE = 0, 9


def make(layout="ttiiiittiit", streams=0, first_id=10):
    """A prompt by a layout of t(ext) and i(mage) tokens; positions 0, 10, 20 … on three unlike axes."""
    visual = torch.tensor([c == "i" for c in layout])
    ids = torch.arange(len(layout)) + first_id
    positions = torch.arange(len(layout)) * 10 + torch.where(visual, torch.tensor([[0], [1], [2]]), 0)
    count = int(visual.sum())
    return Prompt(
        input_ids=torch.where(visual, IMAGE, ids),
        position_ids=positions,
        is_visual=visual,
        embeddings=torch.randn(count, 3),
        next_position=1000,
        streams=tuple(torch.randn(count, 2) for _ in range(streams)),
    )


def masks(*texts):
    return [torch.tensor([c == "1" for c in text]) for text in texts]


def test_sparse_drops_tokens_and_moves_nothing():
    prompt = make()
    sparse = prompt.sparse(masks("0101", "10"), Fusion("none"))
    left = [0, 1, 3, 5, 6, 7, 8, 10]
    assert sparse.input_ids.tolist() == [10, 11, IMAGE, IMAGE, 16, 17, IMAGE, 20]
    assert torch.equal(sparse.position_ids, prompt.position_ids[:, left])
    assert torch.equal(sparse.is_visual, prompt.is_visual[left])
    assert torch.equal(sparse.embeddings, prompt.embeddings[[1, 3, 4]])
    assert sparse.next_position == 1000
    assert len(sparse) == 8


def test_renumbering_is_asked_for():
    sparse = make().sparse(masks("0101", "10"), Fusion("none"), renumber=True)
    assert sparse.position_ids.tolist() == [list(range(8))] * 3
    assert sparse.next_position == 8


def test_images_are_fused_apart_and_streams_with_them():
    prompt = make(streams=2)
    sparse = prompt.sparse(masks("0101", "10"), Fusion("mean"))
    for own, dense in zip((sparse.embeddings, *sparse.streams), (prompt.embeddings, *prompt.streams), strict=True):
        assert len(own) == 3
        assert not torch.equal(own, dense[[1, 3, 4]])
    for image, (part, mask) in enumerate(zip((slice(0, 4), slice(4, 6)), masks("0101", "10"), strict=True)):
        sources = [prompt.embeddings[part], *(stream[part] for stream in prompt.streams)]
        expected = fuse(sources, mask, Fusion("mean"))
        rows = slice(0, 2) if image == 0 else slice(2, 3)
        for got, wanted in zip((sparse.embeddings, *sparse.streams), expected, strict=True):
            assert torch.equal(got[rows], wanted)


@pytest.mark.parametrize("mode", ["none", "mean", "weighted"])
def test_keep_all_is_the_prompt_itself(mode):
    prompt = make(streams=1)
    same = prompt.sparse(masks("1111", "11"), Fusion(mode))
    for name in ("input_ids", "position_ids", "is_visual", "embeddings"):
        assert torch.equal(getattr(same, name), getattr(prompt, name))
    assert torch.equal(same.streams[0], prompt.streams[0])
    assert same.next_position == prompt.next_position


def test_masks_must_fit():
    with pytest.raises(ValueError, match="keep masks for 4 visual tokens do not fit a prompt with 6"):
        make().sparse(masks("1111"))
    with pytest.raises(ValueError, match="no visual token is kept"):
        make().sparse(masks("0000", "00"), Fusion("none"))


def test_head_goes_on_where_the_rest_began():
    prompt = make("ttiiiittt")
    head = prompt.head(6)
    assert len(head) == 6
    assert head.next_position == prompt.position_ids[0, 6] == 60
    assert torch.equal(head.embeddings, prompt.embeddings)
    assert prompt.head(9).next_position == prompt.next_position
    # The largest position before it went with a dropped token; that moves nothing.
    sparse = prompt.sparse(masks("1000"), Fusion("none"))
    assert sparse.head(3).next_position == 60


def test_head_must_hold_all_visual_tokens():
    with pytest.raises(ValueError, match="behind the first 9 tokens"):
        make().head(9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    prompts = [make("tiit", 1), make("ttiiiitt", 1, first_id=30), make("tt", 1)]
    batch = pad_prompts(prompts, PAD, side)
    assert batch.input_ids.shape == (3, 8)
    assert batch.position_ids.shape == (3, 3, 8)
    assert batch.lengths.tolist() == [4, 8, 2]
    for row, prompt in enumerate(prompts):
        real = batch.attention_mask[row].bool()
        assert bool(real[-1 if side == "left" else 0])
        assert int(real.int().diff().abs().sum()) == (len(prompt) < 8)  # one run
        assert torch.equal(batch.input_ids[row, real], prompt.input_ids)
        assert torch.equal(batch.position_ids[:, row, real], prompt.position_ids)
        assert not batch.input_ids[row, ~real].any()
        assert not batch.position_ids[:, row, ~real].any()
    assert torch.equal(batch.embeddings, torch.cat([p.embeddings for p in prompts]))
    assert torch.equal(batch.streams[0], torch.cat([p.streams[0] for p in prompts]))
    assert batch.next_positions.tolist() == [1000] * 3


def test_padding_refuses():
    with pytest.raises(ValueError, match="empty batch"):
        pad_prompts([], PAD)
    with pytest.raises(ValueError, match="side must be"):
        pad_prompts([make()], PAD, "middle")
    with pytest.raises(ValueError, match="shorter"):
        pad_prompts([make(streams=1), make(streams=0)], PAD)


def test_visual_tokens_fit_their_grid():
    grid = TokenGrid.single(2, 3)
    tokens = VisualTokens(torch.zeros(6, 4), grid, resized=(60, 40), streams=(torch.zeros(6, 4),))
    with pytest.raises(ValueError, match="5 visual tokens do not fit a grid of 6"):
        replace(tokens, embeddings=torch.zeros(5, 4))
    with pytest.raises(ValueError, match="7 visual tokens"):
        replace(tokens, streams=(torch.zeros(7, 4),))
