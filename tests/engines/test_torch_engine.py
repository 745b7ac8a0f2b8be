"""Sampling and scoring against the unmodified model, which runs from pixels on each prompt and completion alone."""

import copy
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.backbones import families

from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling, derive_seed
from vitos.engines.packing import pack
from vitos.engines.torch_engine import TorchEngine, chunk_by_tokens

SIZES = [(33, 97), (250, 40), (128, 128), (17, 200)]
TEXTS = [
    "<image>What is shown?",
    "Look: <image> Which kind is in the upper left quadrant?",
    "<image>A. cyst\nB. mass",
    "Is it this?<image>",
]
NONE = Fusion("none")
HOT = Sampling(max_tokens=12, temperature=1.0)


@pytest.fixture(params=["nano", "windowed"])
def backbone(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def dense_prompts(backbone, picture):
    with torch.no_grad():
        visuals = backbone.encode([picture(*size) for size in SIZES])
    return [backbone.build_prompt(text, [visual]) for text, visual in zip(TEXTS, visuals, strict=True)]


def every_third(prompt, shift=0):
    """A sparse prompt of one image, without fusion, and its mask of kept visual tokens."""
    mask = (torch.arange(len(prompt.embeddings)) + shift) % 3 == 0
    return prompt.sparse([mask], NONE), mask


def ids(completions):
    return [[c.token_ids.tolist() for c in row] for row in completions]


def copied(backbone, stop_token_ids=None):
    """A copy whose weights may be changed; it can have other stop tokens, but has the same banned ones."""
    other = type(backbone)(copy.deepcopy(backbone.model), backbone.tokenizer, backbone.image_processor)
    other.banned_token_ids = backbone.banned_token_ids
    if stop_token_ids is not None:
        other.stop_token_ids = stop_token_ids
    return other


# --- greedy: generate() of the unmodified model ---------------------------------------------------------------------


def generate(backbone, inputs, max_tokens):
    """The library's greedy tokens from pixels, with our banned tokens suppressed."""
    out = backbone.model.generate(
        **inputs, max_new_tokens=max_tokens, do_sample=False, suppress_tokens=list(backbone.banned_token_ids)
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_is_generate_of_the_unmodified_model(backbone, picture, hf_inputs, dense_prompts):
    """Our engine runs four image sizes in one batch, the library one at a time."""
    (rows,) = zip(*ids(TorchEngine(backbone).sample(dense_prompts, Sampling(16), [[0]] * 4)), strict=True)
    for got, text, size in zip(rows, TEXTS, SIZES, strict=True):
        assert got == generate(backbone, hf_inputs(backbone, text, [picture(*size)]), 16)
    assert len({tuple(row) for row in rows}) == 4  # the image and the text matter
    assert max(len(set(row)) for row in rows) > 4  # and the text varies


def test_greedy_with_several_images(backbone, picture, hf_inputs):
    text, images = "A <image> and <image><image> differ?", [picture(*size) for size in SIZES[:3]]
    with torch.no_grad():
        prompt = backbone.build_prompt(text, backbone.encode(images))
    (row,) = ids(TorchEngine(backbone).sample([prompt], Sampling(16), [[0]]))
    assert row == [generate(backbone, hf_inputs(backbone, text, images), 16)]


def test_greedy_without_an_image(backbone, hf_inputs):
    text = "What is a cyst?"
    (row,) = ids(TorchEngine(backbone).sample([backbone.build_prompt(text, [])], Sampling(16), [[0]]))
    assert row == [generate(backbone, hf_inputs(backbone, text, []), 16)]


def test_decoding_a_sparse_prompt_is_one_full_forward(backbone, hf_inputs, hf_positions, picture, dense_prompts):
    """Teacher-forced: the dense model with dropped tokens hidden has each sampled token and its log-probability."""
    cases = [every_third(prompt, shift) for shift, prompt in enumerate(dense_prompts)]
    sampled = TorchEngine(backbone).sample([sparse for sparse, _ in cases], Sampling(16), [[0]] * len(cases))
    for (completion,), (_, mask), text, size in zip(sampled, cases, TEXTS, SIZES, strict=True):
        with torch.no_grad():
            logprobs = alone(backbone, hf_inputs, hf_positions, text, [picture(*size)], mask, completion.token_ids)
        assert logprobs.argmax(-1).tolist() == completion.token_ids.tolist()
        expected = logprobs.gather(-1, completion.token_ids[:, None])[:, 0].float()
        torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)


def alone(backbone, hf_inputs, hf_positions, text, images, mask, completion, temperature=1.0):
    """Log-probabilities (L, vocab) of a completion from one forward pass of the unmodified model, from pixels.

    Visual tokens outside `mask` are hidden; positions are those of the library for the dense sequence.
    """
    inputs = hf_inputs(backbone, text, images, extra_ids=completion.tolist())
    visible = inputs["attention_mask"].bool()
    if mask is not None:
        positions = hf_positions(backbone, inputs)
        visible = visible.masked_scatter(inputs["mm_token_type_ids"].bool(), mask)
        inputs |= {"attention_mask": visible.long(), "position_ids": positions[:, None]}
    logits = backbone.model(**inputs).logits[0, -len(completion) - 1 : -1] / temperature
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
    banned[list(backbone.banned_token_ids)] = True
    return logits.masked_fill(banned, float("-inf")).log_softmax(-1)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(backbone, dense_prompts):
    engine = TorchEngine(backbone)
    prompts = [*dense_prompts, every_third(dense_prompts[2])[0]]
    seeds = [[derive_seed("run", p, i) for i in range(3)] for p in range(len(prompts))]
    together = engine.sample(prompts, HOT, seeds)
    for prompt, row, own in zip(prompts, together, seeds, strict=True):
        for completion, seed in zip(row, own, strict=True):
            ((single,),) = engine.sample([prompt], HOT, [[seed]])
            assert single.token_ids.tolist() == completion.token_ids.tolist()
            torch.testing.assert_close(single.logprobs, completion.logprobs, rtol=0, atol=1e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = ids(engine.sample([prompts[i] for i in order], HOT, [seeds[i][::-1] for i in order]))
    assert shuffled == [ids(together)[i][::-1] for i in order]
    assert len({tuple(row) for group in ids(together) for row in group}) == 15  # other seeds, other texts


@pytest.mark.parametrize("budget", [1, 200, 400])
def test_small_batches_change_nothing(backbone, dense_prompts, budget, monkeypatch):
    prompts = [every_third(dense_prompts[1])[0], *dense_prompts]
    seeds = [[1, 2], [3], [4, 5, 6], [7], [8]]
    expected = TorchEngine(backbone).sample(prompts, HOT, seeds)
    engine, sizes = TorchEngine(backbone, max_batch_tokens=budget), []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda chunk, known: sizes.append(len(chunk)) or prefill(chunk, known))
    assert ids(engine.sample(prompts, HOT, seeds)) == ids(expected)
    assert len(sizes) > 1
    assert sum(sizes) == 5
    if budget == 1:
        assert sizes == [1] * 5


def test_siblings_share_one_prefill(backbone, dense_prompts, monkeypatch):
    engine, lengths = TorchEngine(backbone), []
    call = backbone.model.forward
    monkeypatch.setattr(
        backbone.model, "forward", lambda **k: lengths.append(tuple(k["input_ids"].shape)) or call(**k)
    )
    (row,) = engine.sample(dense_prompts[:1], Sampling(3, 1.0), [[1, 2, 3, 4]])
    assert len(row) == 4
    assert lengths == [(1, len(dense_prompts[0])), (1, 4), (1, 4)]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_models_probabilities(nano, hf_inputs, temperature):
    text = "What is a cyst?"
    engine, prompt = TorchEngine(nano), nano.build_prompt(text, [])
    counts = np.zeros(nano.model.config.text_config.vocab_size)
    for block in range(5):
        seeds = [derive_seed("frequency", block, i) for i in range(800)]
        for completion in engine.sample([prompt], Sampling(1, temperature), [seeds])[0]:
            counts[completion.token_ids] += 1
    with torch.no_grad():
        logits = nano.model(**hf_inputs(nano, text, [])).logits[0, -1] / temperature
    logits[list(nano.banned_token_ids)] = float("-inf")
    expected = logits.softmax(-1).numpy() * counts.sum()
    often = expected >= 5
    assert often.sum() >= 5
    bins = [np.append(values[often], values[~often].sum()) for values in (counts, expected)]
    assert chisquare(*bins).pvalue > 0.001
    assert not counts[list(nano.banned_token_ids)].any()


def test_temperature_sharpens(backbone, dense_prompts):
    """At a low temperature, sampling is greedy; log-probabilities are those at the temperature."""
    engine = TorchEngine(backbone)
    greedy, cold = (engine.sample(dense_prompts[:2], Sampling(8, t), [[5], [6]]) for t in (0.0, 1e-5))
    assert ids(greedy) == ids(cold)
    completions = engine.sample(dense_prompts[:2], Sampling(8, 0.7), [[5], [6]])
    scores = engine.score(dense_prompts[:2], [[c.token_ids for c in row] for row in completions], temperature=0.7)
    for (completion,), row, mask in zip(completions, scores.logprobs, scores.mask, strict=True):
        torch.testing.assert_close(completion.logprobs, row[mask].detach(), rtol=0, atol=1e-5)


def test_banned_tokens_are_never_sampled_even_if_the_model_wants_nothing_else(windowed, picture):
    backbone = copied(windowed)
    with torch.no_grad():
        prompt = backbone.build_prompt("<image>What?", backbone.encode([picture(40, 40)]))
        head = backbone.model.lm_head
        bias = torch.zeros(head.out_features, dtype=torch.float64)
        bias[list(backbone.banned_token_ids)] = 1e4
        head.bias = torch.nn.Parameter(bias)
    engine = TorchEngine(backbone)
    for sampling in (Sampling(12), Sampling(12, 1.0), Sampling(12, 50.0)):
        (row,) = engine.sample([prompt], sampling, [list(range(20))])
        drawn = {token for completion in row for token in completion.token_ids.tolist()}
        assert not drawn & set(backbone.banned_token_ids)
        assert all(bool(completion.logprobs.isfinite().all()) for completion in row)
    scores = engine.score([prompt], [[c.token_ids for c in row]], temperature=50.0)
    for completion, logprobs, mask in zip(row, scores.logprobs, scores.mask, strict=True):
        torch.testing.assert_close(logprobs[mask].detach(), completion.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_hit_no_banned_token(nano, monkeypatch, uniform):
    """0 is on the edge of token 0, which is banned and has probability 0."""
    assert 0 in nano.banned_token_ids
    monkeypatch.setattr("vitos.engines.torch_engine._uniform", lambda seed, count: np.full(count, uniform))
    for row in TorchEngine(nano).sample([nano.build_prompt("What?", [])], HOT, [[0]]):
        assert not set(row[0].token_ids.tolist()) & set(nano.banned_token_ids)
        assert bool(row[0].logprobs.isfinite().all())


def test_a_stop_token_ends_an_answer_and_is_part_of_it(backbone, dense_prompts):
    free = TorchEngine(copied(backbone, stop_token_ids=())).sample(dense_prompts, HOT, [[1, 2, 3]] * 4)
    assert all(len(c.token_ids) == 12 and not c.finished for row in free for c in row)
    stop = int(free[0][0].token_ids[4])  # a token that is in some of the texts and not in others
    ended = TorchEngine(copied(backbone, stop_token_ids=(stop, 2))).sample(dense_prompts, HOT, [[1, 2, 3]] * 4)
    finished = 0
    for before, after in zip((c for row in free for c in row), (c for row in ended for c in row), strict=True):
        tokens = before.token_ids.tolist()
        ends = [place for place, token in enumerate(tokens) if token in (stop, 2)]
        length = ends[0] + 1 if ends else 12
        finished += bool(ends)
        assert after.token_ids.tolist() == tokens[:length]
        assert after.finished == bool(ends)
        assert len(after.logprobs) == length
        torch.testing.assert_close(after.logprobs, before.logprobs[:length], rtol=0, atol=1e-5)
        assert after.text == backbone.tokenizer.decode(after.token_ids, skip_special_tokens=True)
    assert 0 < finished < 12


def test_ended_rows_leave_the_batch_and_nobody_notices(backbone, dense_prompts, monkeypatch):
    """Compared with each row alone; the batch shrinks whenever half of it has ended."""
    free = TorchEngine(copied(backbone, stop_token_ids=())).sample(dense_prompts, HOT, [[1, 2, 3]] * 4)
    texts = [c.token_ids.tolist() for row in free for c in row]
    # With six stop tokens, rows end at different steps, and some not at all.
    stops = tuple({text[place] for text, place in zip(texts, (1, 2, 3, 5, 7, 9), strict=False)})
    ended = copied(backbone, stop_token_ids=stops)
    engine, rows = TorchEngine(ended), []
    call = ended.model.forward
    monkeypatch.setattr(ended.model, "forward", lambda **k: rows.append(tuple(k["input_ids"].shape)) or call(**k))
    together = engine.sample(dense_prompts, HOT, [[1, 2, 3]] * 4)
    lengths = [len(c.token_ids) for row in together for c in row]
    assert len(set(lengths)) > 3
    batch = [[*range(3 * p, 3 * p + 3)] for p in range(4)]
    for step, shape in enumerate(rows[1:], start=1):
        running = [[i for i in row if lengths[i] > step] for row in batch]
        if 2 * sum(map(len, running)) <= sum(map(len, batch)):
            batch = [row for row in running if row]
        assert shape == (len(batch), max(map(len, batch)))
    assert len(batch) < 4
    for prompt, row in zip(dense_prompts, together, strict=True):
        for seed, completion in zip((1, 2, 3), row, strict=True):
            ((single,),) = engine.sample([prompt], HOT, [[seed]])
            assert completion.token_ids.tolist() == single.token_ids.tolist()
            assert (completion.text, completion.finished) == (single.text, single.finished)
            torch.testing.assert_close(completion.logprobs, single.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens_is_a_hard_limit(backbone, dense_prompts, limit):
    engine = TorchEngine(copied(backbone, stop_token_ids=()))
    long = ids(engine.sample(dense_prompts, HOT, [[1, 2]] * 4))
    short = engine.sample(dense_prompts, Sampling(limit, 1.0), [[1, 2]] * 4)
    # A seed gives the same tokens, whatever the limit.
    assert ids(short) == [[row[:limit] for row in group] for group in long]


def test_every_move_is_timed(backbone, dense_prompts):
    seen = []

    @contextmanager
    def stage(name):
        seen.append(name)
        yield

    TorchEngine(backbone).sample(dense_prompts[:1], Sampling(2), [[0]], stage)
    assert seen == ["prefill", "decode"]


def test_sampling_refuses(backbone, dense_prompts):
    for wrong in ({"max_tokens": 0}, {"max_tokens": 1, "temperature": -1.0}):
        with pytest.raises(ValueError, match="max_tokens must be >= 1"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="2 prompts but seeds for 1"):
        TorchEngine(backbone).sample(dense_prompts[:2], HOT, [[0]])
    assert TorchEngine(backbone).sample([], HOT, []) == []


def test_broken_weights_are_an_error_and_no_text(backbone, dense_prompts):
    backbone = copied(backbone)
    backbone.model.model.language_model.norm.weight.data.fill_(float("nan"))
    for sampling in (Sampling(2), Sampling(2, 1.0)):
        with pytest.raises(ValueError, match="not finite"):
            TorchEngine(backbone).sample(dense_prompts[:1], sampling, [[0]])


def test_derived_seeds_depend_on_every_part_and_on_nothing_else():
    paths = [(run, step, ident, i) for run in (0, 1) for step in (0, 1) for ident in ("a", "b") for i in range(20)]
    assert len({derive_seed(*path) for path in paths}) == len(paths)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, "train/0/1", "reasoning", 2, 3) == 0x46A999841592AFCF  # on every machine


# --- scoring --------------------------------------------------------------------------------------------------------


def test_scores_and_every_gradient_are_those_of_separate_runs(backbone, hf_inputs, hf_positions, picture):
    """Dense and sparse prompts with one to three completions of different length, with the encoder's gradients.

    Compared with the unmodified model on each prompt and completion alone, from pixels, without a cache.
    """
    images = [picture(*size) for size in SIZES[:3]]
    visuals = backbone.encode(images)
    dense = [backbone.build_prompt(text, [visual]) for text, visual in zip(TEXTS, visuals, strict=False)]
    sparse, mask = every_third(dense[1])
    prompts, masks = [dense[0], sparse, dense[2]], [None, mask, None]
    draw = np.random.default_rng(0)
    completions = [
        [torch.from_numpy(draw.integers(13, 700, size=length)) for length in lengths]
        for lengths in ((5, 1, 9), (7, 3), (4,))
    ]
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    scores = TorchEngine(backbone).score(prompts, completions, temperature=0.8)
    assert scores.mask.sum(-1).tolist() == [5, 1, 9, 7, 3, 4]
    assert scores.prompt_tokens_run == sum(map(len, prompts))
    assert not scores.logprobs[~scores.mask].any()
    backbone.model.zero_grad()
    (weights * scores.logprobs).sum().backward()
    shared = {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}

    backbone.model.zero_grad()
    row = 0
    for text, image, own_mask, siblings in zip(TEXTS, images, masks, completions, strict=False):
        for tokens in siblings:
            logprobs = alone(backbone, hf_inputs, hf_positions, text, [image], own_mask, tokens, temperature=0.8)
            logprobs = logprobs.gather(-1, tokens[:, None])[:, 0]
            (weights[row, : len(tokens)] * logprobs).sum().backward()
            got = scores.logprobs[row, : len(tokens)].detach().double()
            torch.testing.assert_close(got, logprobs.detach(), rtol=1e-5, atol=1e-6)
            row += 1
    expected = {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}
    backbone.model.zero_grad()

    assert shared.keys() == expected.keys() == dict(backbone.model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        difference = (shared[name] - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-5, f"{name}: {difference}"


def test_scores_of_what_was_sampled(backbone, dense_prompts):
    engine = TorchEngine(backbone)
    sparse, mask = every_third(dense_prompts[1])
    prompts = [dense_prompts[0], sparse, dense_prompts[1].sparse([mask], Fusion("weighted"))]
    sampled = engine.sample(prompts, HOT, [[1, 2], [3], [4, 5]])
    with torch.no_grad():
        scores = engine.score(prompts, [[c.token_ids for c in row] for row in sampled])
    flat = [completion for row in sampled for completion in row]
    for completion, row, mask in zip(flat, scores.logprobs, scores.mask, strict=True):
        torch.testing.assert_close(row[mask], completion.logprobs, rtol=0, atol=1e-5)


def test_scoring_through_another_callable(backbone, dense_prompts):
    """The engine calls the wrapper around the model, such as DDP, and not the model."""
    calls = []

    def wrapper(**inputs):
        calls.append(inputs["input_ids"].shape)
        return backbone.model(**inputs)

    with torch.no_grad():
        TorchEngine(backbone, model=wrapper).score(
            dense_prompts[:2], [[torch.tensor([20, 21, 22])] * 2, [torch.tensor([9])]]
        )
    first, second = map(len, dense_prompts[:2])
    assert [tuple(shape) for shape in calls] == [(2, max(first + 6, second + 1))]  # each prompt once, no padding


def test_score_refuses(backbone, dense_prompts):
    with pytest.raises(ValueError, match="2 prompts but completions for 1"):
        TorchEngine(backbone).score(dense_prompts[:2], [[torch.tensor([5])]])


# --- micro-batches --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=12),
    st.integers(1, 400),
    st.sampled_from((0.0, 0.5, 0.75, 1.0)),
)
def test_chunks_hold_every_prompt_once_and_as_many_as_fit(sizes, budget, narrowest):
    def padded(chunk):
        return sum(sizes[i][0] for i in chunk) * max(sizes[i][1] for i in chunk)

    def widest(chunk):
        return max(sizes[i][1] for i in chunk)

    chunks = list(chunk_by_tokens(sizes, budget, narrowest))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(sizes)))
    assert all(len(chunk) == 1 or padded(chunk) <= budget for chunk in chunks)
    assert all(sizes[i][1] >= narrowest * widest(chunk) for chunk in chunks for i in chunk)
    for chunk, after in itertools.pairwise(chunks):
        assert padded([*chunk, after[0]]) > budget or sizes[after[0]][1] < narrowest * widest(chunk)
    widths = [sizes[i][1] for chunk in chunks for i in chunk]
    assert widths == sorted(widths, reverse=True)  # padding is least if neighbours have similar lengths


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 900))
def test_scoring_batches_are_as_large_as_packing_lays_them_out(lengths, budget):
    """The number of tokens that run, with padding, is that of the rows that `pack` makes."""
    backbone = families.FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    prompts = [backbone.build_prompt("What is a cyst? " * (2 * n + 1), []) for n in range(len(lengths))]
    completions = [[torch.full((length,), 20) for length in row] for row in lengths]

    def run(chunk):
        return pack([prompts[i] for i in chunk], [completions[i] for i in chunk], 0).batch.input_ids.numel()

    batches = list(TorchEngine(backbone, max_batch_tokens=budget).score_batches(prompts, completions))
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    assert all(len(batch) == 1 or run(batch) <= budget for batch in batches)
    rows = [len(prompt) + sum(map(len, ids)) for prompt, ids in zip(prompts, completions, strict=True)]
    for batch, after in itertools.pairwise(batches):
        assert run([*batch, after[0]]) > budget or rows[after[0]] < 0.75 * max(rows[i] for i in batch)
