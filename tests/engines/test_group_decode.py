"""Completions of a prompt in one row against each of them alone, and the growing cache against the library's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.backbones.families import FAMILIES, FAMILIES_BY_NAME
from transformers import DynamicCache

from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling
from vitos.engines.group_decode import Siblings
from vitos.engines.kv_cache import GrowingLayer, growing_cache
from vitos.engines.prefix import cache_bytes
from vitos.engines.torch_engine import TorchEngine

NONE = Fusion("none")
SEEDS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def build_prompts(family, picture):
    """Prompts of different length: dense, sparse, without an image and, if the family can do it, gathered."""
    backbone = family.backbone()
    (visual,) = backbone.encode([picture(*family.sizes[0])])
    dense = backbone.build_prompt("<image>What is shown?", [visual])
    third = torch.arange(len(dense.embeddings)) % 3 == 0
    prompts = [dense, dense.sparse([third], NONE), backbone.build_prompt("What is a cyst?", [])]
    return [*prompts, dense if backbone.cache_refusal else dense.gather([third])]


@every_family
@torch.no_grad()
def test_no_completion_can_tell_that_it_has_siblings(family, picture):
    """Every eighth token of the vocabulary ends a completion, so that rows and columns leave at many steps."""
    backbone = family.backbone()
    stops, banned = backbone.stop_token_ids, backbone.banned_token_ids
    prompts = build_prompts(family, picture)
    try:
        backbone.stop_token_ids, backbone.banned_token_ids = tuple(range(0, len(backbone.tokenizer), 8)), banned
        engine = TorchEngine(backbone)
        together = engine.sample(prompts, Sampling(10, 1.0), SEEDS)
        lengths = {len(completion.token_ids) for row in together for completion in row}
        assert len(lengths) > 2
        for prompt, row, seeds in zip(prompts, together, SEEDS, strict=True):
            for completion, seed in zip(row, seeds, strict=True):
                ((single,),) = engine.sample([prompt], Sampling(10, 1.0), [[seed]])
                assert completion.token_ids.tolist() == single.token_ids.tolist()
                torch.testing.assert_close(completion.logprobs, single.logprobs, rtol=0, atol=1e-5)
    finally:
        backbone.stop_token_ids, backbone.banned_token_ids = stops, banned


@torch.no_grad()
def test_a_prompt_is_held_once(picture):
    """The cache has the bytes of one prompt and of each completion's tokens; the attention function is restored."""
    backbone = FAMILIES_BY_NAME["llava, LLaVA-Med"].backbone()
    config = backbone.model.config.get_text_config()
    before, prompt = config._attn_implementation, backbone.build_prompt("What is shown?", [])
    engine = TorchEngine(backbone)
    ((one,),) = engine.sample([prompt], Sampling(2, 1.0), [[1]])
    alone = engine.kv_bytes
    assert len(one.token_ids) == 2
    engine.sample([prompt], Sampling(2, 1.0), [[1] * 5])
    token = alone // (len(prompt) + 1)
    assert engine.kv_bytes == token * (len(prompt) + 5)
    assert config._attn_implementation == before == "sdpa"


@torch.no_grad()
def test_slow_attention_has_a_row_for_each_sibling(picture):
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].build()
    prompt = backbone.build_prompt("What is shown?", [])
    expected = TorchEngine(backbone).sample([prompt], Sampling(6, 1.0), [[1, 2, 3]])
    backbone.model.set_attn_implementation("eager")
    got = TorchEngine(backbone).sample([prompt], Sampling(6, 1.0), [[1, 2, 3]])
    assert [c.token_ids.tolist() for c in got[0]] == [c.token_ids.tolist() for c in expected[0]]


def test_a_failing_model_leaves_its_attention_as_it_was():
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].build()
    config = backbone.model.config.get_text_config()
    prompt, calls, run = backbone.build_prompt("What is shown?", []), [], backbone.model.forward

    def second_fails(**inputs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(**inputs)

    with pytest.raises(RuntimeError, match="out of memory"):
        TorchEngine(backbone, model=second_fails).sample([prompt], Sampling(6, 1.0), [[1, 2]])
    assert config._attn_implementation == "sdpa"


@torch.no_grad()
def test_siblings_take_over_the_cache_and_change_nothing_else_of_what_they_were_given():
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    engine, prompts = TorchEngine(backbone), [backbone.build_prompt(text, []) for text in ("What?", "Where is it?")]
    ready = engine.prefill(prompts, [None, None])
    before = {name: getattr(ready, name).clone() for name in ("logits", "mask", "next_positions")}
    siblings = Siblings.of(ready, [2, 3], backbone)
    assert siblings.cache is ready.cache
    assert torch.equal(siblings.logits, before["logits"][[0, 0, 1, 1, 1]])
    siblings.advance(backbone.model, siblings.logits.argmax(-1))
    left = siblings.select(torch.tensor([1, 4]))
    assert left.cache is ready.cache
    assert torch.equal(left.logits, siblings.logits[[1, 4]])
    assert all(torch.equal(getattr(ready, name), value) for name, value in before.items())


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    moves=st.lists(st.sampled_from(["go on", "rows", "tokens"]), max_size=12),
    seed=st.integers(0, 99),
)
def test_a_growing_cache_holds_what_the_librarys_does(lengths, moves, seed):
    make = torch.Generator().manual_seed(seed)
    config = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone().model.config.get_text_config()
    ours, theirs = growing_cache(config), DynamicCache(config=config)
    rows = 3
    for length, move in zip(lengths, [*moves, *["go on"] * len(lengths)], strict=False):
        keys, values = torch.randn(2, rows, 2, length, 4, generator=make)
        for a, b in zip(ours.update(keys, values, 0), theirs.update(keys, values, 0), strict=True):
            assert torch.equal(a, b)
        layer = ours.layers[0]
        assert isinstance(layer, GrowingLayer)
        if move == "rows":
            index = torch.randint(rows, (rows,), generator=make)
            ours.batch_select_indices(index)
            theirs.batch_select_indices(index)
        if move == "tokens":
            index = torch.arange(0, layer.get_seq_length(), 2)
            layer.keep_tokens(index)
            theirs.layers[0].keys, theirs.layers[0].values = (
                x[:, :, index] for x in (theirs.layers[0].keys, theirs.layers[0].values)
            )
        assert torch.equal(layer.keys, theirs.layers[0].keys)
        assert torch.equal(layer.values, theirs.layers[0].values)
        assert layer.get_seq_length() == theirs.layers[0].get_seq_length()
    assert cache_bytes(type("One", (), {"layers": [ours.layers[0]]})) == cache_bytes(
        type("One", (), {"layers": [theirs.layers[0]]})
    )
