"""Positions of pruned prompts against `Prompt.sparse`, on M-RoPE and on one axis."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitos.core.geometry import TokenGrid
from vitos.core.prompt import VisualTokens
from vitos.core.sparsify import Fusion
from vitos.engines.vllm.plugin.positions import as_given, with_gaps


@st.composite
def layouts(draw):
    """Lengths of the texts around images, and the grid and mask of kept tokens of each image."""
    images = []
    for _ in range(draw(st.integers(0, 3))):
        rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        count = rows * cols
        images.append((rows, cols, draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))))
    texts = [draw(st.integers(1, 4)) for _ in range(len(images) + 1)]
    return texts, images


@given(layouts(), st.booleans())
def test_positions_are_those_of_the_sparse_prompt(nano, layout, mrope):
    texts, images = layout
    visuals = [
        VisualTokens(
            torch.zeros(r * c, nano.model.config.text_config.hidden_size), TokenGrid.single(r, c), resized=(8, 8)
        )
        for r, c, _ in images
    ]
    dense = dense_prompt(nano, texts, visuals, mrope)
    masks = [torch.tensor(kept) for *_, kept in images]
    sparse = dense.sparse(masks, Fusion("none")) if images else dense
    places, first = [], 0
    for length, mask in zip(texts, masks, strict=False):
        places.append((first + length, mask))
        first += length + int(mask.sum())

    def of_the_whole(length, starts):
        assert length == len(dense)
        assert starts == [start for start in range(length) if starts_image(dense, visuals, start)]
        return dense.position_ids

    positions, offset = with_gaps(len(sparse), places, of_the_whole)
    assert torch.equal(positions, sparse.position_ids)
    assert offset + len(sparse) == sparse.next_position


def dense_prompt(backbone, texts, visuals, mrope):
    from vitos.core.prompt import Prompt

    is_visual = [False] * texts[0]
    for visual, length in zip(visuals, texts[1:], strict=True):
        is_visual += [True] * visual.grid.num_tokens + [False] * length
    is_visual = torch.tensor(is_visual)
    positions = backbone.position_ids(is_visual, visuals) if mrope else torch.arange(len(is_visual))[None]
    embeddings = torch.cat([v.embeddings for v in visuals]) if visuals else torch.zeros(0, 1)
    return Prompt(
        input_ids=torch.zeros(len(is_visual)),
        position_ids=positions,
        is_visual=is_visual,
        embeddings=embeddings,
        next_position=int(positions.max()) + 1,
    )


def starts_image(prompt, visuals, index):
    return bool(prompt.is_visual[index]) and (index == 0 or not bool(prompt.is_visual[index - 1]))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 60), st.integers(0, 4))
def test_given_positions_go_on_where_the_prompt_says(positions, following, generated):
    given_ = torch.tensor([[*positions, following]]).expand(3, -1)
    placed, offset = as_given(given_, len(positions) + generated)
    assert placed[0].tolist() == positions + [following + i for i in range(generated)]
    assert offset + len(positions) == following  # position of the token with index len(positions)
