"""Published rivals: what they see of a real model, against the library's own outputs, and budgets of any size."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.backbones.families import FAMILIES_BY_NAME

from vitos.core.geometry import Box
from vitos.core.prompt import pad_prompts
from vitos.core.record import Record
from vitos.engines.base import Sampling
from vitos.eval.selectors import SELECTORS, Task
from vitos.eval.selectors.dart import unlike_pivots
from vitos.eval.selectors.hiprune import anchored
from vitos.eval.selectors.holov import crop_wise
from vitos.eval.selectors.mmtok import coverage_order
from vitos.eval.selectors.prumerge import outliers, outliers_and_steps, spaced, summed_merge
from vitos.eval.selectors.pyramiddrop import staged
from vitos.eval.selectors.scope import salient_coverage_order
from vitos.eval.selectors.sparsevlm import density_peaks, raters, recycled_merge
from vitos.eval.selectors.vispruner import important_and_diverse
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

QUESTION = "<image>Where is the nodule?\nA. left\nB. right"


@pytest.fixture(params=["qwen2_5_vl, nano", "llava, LLaVA-1.5"])
def task(request, picture):
    policy, image = SparseVLM(FAMILIES_BY_NAME[request.param].backbone()), picture(120, 160)
    record = Record("q1", (), QUESTION, "A", (Box(0.1, 0.1, 0.4, 0.5),))
    return Task(policy, Query(policy.encode(image), QUESTION), record, image=lambda: image)


def outputs(task, **options):
    """Outputs of a copy of the model with the library's eager attention on the dense prompt."""
    backbone = task.policy.backbone
    model = copy.deepcopy(backbone.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**backbone.model_inputs(pad_prompts([task.prompt], backbone.pad_token_id)), **options)


def test_sparsevlm_goes_by_the_raters_rows(task):
    """The words behind the image that fit it more than the average word, found by loops."""
    visual = task.visual.embeddings.double()
    table = task.policy.backbone.model.get_input_embeddings().weight.detach().double()
    behind = range(int(task.prompt.is_visual.nonzero()[-1]) + 1, len(task.prompt))
    words = [table[task.prompt.input_ids[place]] for place in behind]
    fits = np.zeros(len(words))
    for token in visual:
        products = np.array([float(token @ word) for word in words])
        fits += np.exp(products - products.max()) / np.exp(products - products.max()).sum()
    rows = [place for place, fit in zip(behind, fits, strict=True) if fit > fits.mean()]
    assert raters(visual, torch.stack(words)).tolist() == [row - behind[0] for row in rows]
    weights = outputs(task, output_attentions=True).attentions[1][0].mean(0)[rows].mean(0)
    expected = weights[task.prompt.is_visual].topk(3).indices.tolist()
    total = task.grid.num_tokens
    mask = SELECTORS["sparsevlm"].choose(task, max(8, total // 2)).mask
    assert mask[expected].all()


def test_pyramiddrop_goes_by_the_last_token_at_each_stage(task):
    layers = len(task.policy.backbone.model.model.get_decoder().layers)
    attentions = outputs(task, output_attentions=True).attentions
    scores = [attentions[max(1, layers * stage // 4) - 1][0].mean(0)[-1][task.prompt.is_visual] for stage in (1, 2, 3)]
    total = task.grid.num_tokens
    count = total // 8
    left = list(range(total))
    for stage, score in enumerate(scores, 1):
        number = max(count, round(total * (count / total) ** (stage / 3)))
        left = sorted(left, key=lambda i, score=score: -float(score[i]))[:number]
    np.testing.assert_array_equal(np.flatnonzero(SELECTORS["pyramiddrop"].choose(task, count).mask), sorted(left))


def test_dart_goes_by_the_cached_keys_and_the_hidden_states(task):
    seen = outputs(task, output_hidden_states=True, use_cache=True)
    keys = seen.past_key_values.layers[0].keys[0].transpose(0, 1).flatten(1).double()
    hidden, visual = seen.hidden_states[2][0].double(), task.prompt.is_visual
    count = task.grid.num_tokens // 4
    expected = unlike_pivots(hidden[visual], keys[visual], hidden[~visual], keys[~visual], count)
    np.testing.assert_array_equal(SELECTORS["dart"].choose(task, count).mask, expected)


@pytest.mark.parametrize("name", ["fastv", "dart"])
def test_in_flight_the_others_leave_behind_layer_two(name, task):
    """Against the unmodified model: in the layers behind the second one a mask hides the dropped tokens."""
    count, backbone = task.grid.num_tokens // 4, task.policy.backbone
    choice = SELECTORS[f"{name}_in_flight"].choose(task, count)
    np.testing.assert_array_equal(choice.mask, SELECTORS[name].choose(task, count).mask)
    prompt = task.prompt_of(choice)
    inputs = backbone.model_inputs(pad_prompts([task.prompt], backbone.pad_token_id))
    kept = ~task.prompt.is_visual
    kept[task.prompt.is_visual] = torch.from_numpy(choice.mask)
    length = len(task.prompt)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masked = (causal & (kept[None] | torch.eye(length, dtype=torch.bool)))[None, None]

    def hide(module, args, kwargs):
        return args, kwargs | {"attention_mask": masked}

    layers = backbone.model.model.get_decoder().layers
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers[2:]]
    with torch.no_grad():
        expected = backbone.model(**inputs, use_cache=False).logits[0, -1].argmax()
    for hook in hooks:
        hook.remove()
    ((rollout,),) = task.policy.reason([task.query], [prompt], Sampling(1))
    assert rollout.completion.token_ids[0] == expected


def test_dart_by_loops():
    rng = np.random.default_rng(3)
    tokens, keys, words, word_keys = rng.normal(size=(20, 5)), rng.normal(size=(20, 6)), *rng.normal(size=(2, 3, 6))
    words = words[:, :5]

    def longest(values, number):
        return sorted(range(len(values)), key=lambda i: -np.abs(values[i]).sum())[:number]

    own = longest(keys, 4)
    chosen, pivots = list(own), [*tokens[own], *words[longest(word_keys, 4)]]
    for pivot in pivots:
        likeness = [p @ pivot / np.linalg.norm(p) / np.linalg.norm(pivot) for p in tokens]
        free = sorted((i for i in range(20) if i not in chosen), key=lambda i: likeness[i])
        chosen += free[: min(-(-9 // 7), 13 - len(chosen))]
    found = unlike_pivots(*map(torch.from_numpy, (tokens, keys, words, word_keys)), 13)
    assert np.flatnonzero(found).tolist() == sorted(chosen)


def test_resize_shows_the_whole_image_at_fewer_pixels(picture):
    policy, image = SparseVLM(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()), picture(120, 160)
    record = Record("q1", (), QUESTION, "A", None)
    task = Task(policy, Query(policy.encode(image), QUESTION), record, image=lambda: image)
    choice = SELECTORS["resize"].choose(task, 12)
    (view,) = choice.visual.grid.views
    assert (image.size, view.rows, view.cols) == ((120, 160), 4, 3)
    side = policy.backbone.geometry.patch_size * policy.backbone.geometry.merge_size
    (expected,) = policy.backbone.encode([image.resize((3 * side, 4 * side), 3)])  # 3: bicubic
    torch.testing.assert_close(task.prompt_of(choice).embeddings, expected.embeddings)
    assert choice.count == 12
    assert not choice.fallback
    llava = FAMILIES_BY_NAME["llava, LLaVA-1.5"].backbone()
    assert "'resize' encodes images of a few tokens, but Llava" in SELECTORS["resize"].refusal(llava)


def test_prumerge_adds_neighbours_by_loops():
    rng = np.random.default_rng(0)
    keys, attention = torch.from_numpy(rng.normal(size=(50, 6))), torch.from_numpy(rng.random(50)).softmax(0)
    chosen = spaced(attention, 9)
    assert len(set(chosen.tolist())) == 9
    assert set(chosen[:2].tolist()) == set(attention.topk(2).indices.tolist())
    mask, matrix = summed_merge(keys, attention, chosen)
    places = np.flatnonzero(mask)
    dropped = [i for i in range(50) if i not in chosen.tolist()]
    assert set(places) == {*chosen.tolist(), dropped[-1]}
    unit = keys / keys.norm(dim=1, keepdim=True)
    for row, place in zip(matrix, places, strict=True):
        expected = torch.zeros(50)
        if place == dropped[-1]:
            expected[dropped] = attention[dropped].float()
        else:
            others = sorted((i for i in range(50) if i != place), key=lambda i: -float(unit[i] @ unit[place]))[:32]
            expected[others] = attention[others].float()
            expected[place] = 1
        torch.testing.assert_close(row, expected)


def test_prumerge_plus_without_outliers_says_so():
    even = torch.full((30,), 1 / 30, dtype=torch.float64)
    assert len(outliers(even)) == 0
    with pytest.raises(ValueError, match="0 of 30 tokens are outliers"):
        outliers_and_steps(even)


def test_clusters_are_around_the_dense_points():
    rng = np.random.default_rng(1)
    corners = np.array([[0, 0], [8, 0], [0, 8]])
    points = torch.from_numpy(np.repeat(corners, 7, axis=0) + 0.1 * rng.normal(size=(21, 2)))
    centres, owner = density_peaks(points, 3)
    assert sorted(int(centre) // 7 for centre in centres) == [0, 1, 2]
    for start in (0, 7, 14):
        assert len(set(owner[start : start + 7].tolist())) == 1


@given(st.integers(2, 70), st.integers(0, 10_000), st.data())
def test_any_budget_is_met(total, seed, data):
    count = data.draw(st.integers(1, total))
    rng = np.random.default_rng(seed)
    tokens, words, keys = (torch.from_numpy(rng.normal(size=(n, 6))) for n in (total, 4, total))
    attention, middle = (torch.from_numpy(rng.random(total) ** 6).softmax(0) for _ in range(2))
    masks = [
        anchored(middle, attention, count, cols=7, alpha=data.draw(st.sampled_from([0.1, 0.5, 1.0]))),
        unlike_pivots(tokens, keys, words, words, count),
        staged([attention, middle], count),
    ]
    orders = [
        coverage_order(tokens, words, keys, count),
        salient_coverage_order(tokens, attention, count),
        important_and_diverse(tokens, attention, count),
        spaced(attention, count),
    ]
    assert [int(mask.sum()) for mask in masks] == [count] * 3
    assert [len(set(order.tolist())) for order in orders] == [count] * 4
    few = crop_wise(tokens, attention, count, crops=data.draw(st.integers(1, 16)))
    assert len(set(few.tolist())) == len(few) <= count
    kept = min(count, total - 1)
    mask, matrix = recycled_merge(tokens, attention, kept)
    assert mask.sum() == len(matrix) > kept
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)))


@given(st.integers(3, 40), st.integers(0, 10_000))
def test_coverage_grows_most_at_every_step(total, seed):
    """MMTok's order against trying all: the set's coverage of words and image after each choice is the largest."""
    rng = np.random.default_rng(seed)
    tokens, words = rng.normal(size=(total, 5)), rng.normal(size=(3, 5))

    def shares(a, b, temperature):
        cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
        weights = np.exp(cosine / temperature - (cosine / temperature).max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    by_word, by_token = shares(words, tokens, 0.01), shares(tokens, tokens, 0.2)

    def coverage(chosen):
        return by_word[:, chosen].max(1).mean() + 0.5 * by_token[:, chosen].max(1).mean()

    order = coverage_order(*map(torch.from_numpy, (tokens, words, tokens)), 3).tolist()
    for step in range(3):
        best = max(coverage([*order[:step], i]) for i in range(total) if i not in order[:step])
        assert coverage(order[: step + 1]) == pytest.approx(best, rel=1e-9)
