"""Every selector on real backbones: exact budgets, its own rule by brute force, refusals, and what the model sees."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.backbones.families import FAMILIES_BY_NAME

from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.geometry import WHOLE_IMAGE, Box, Rect, TokenGrid
from vitos.core.masks import fit_budget
from vitos.core.record import Record
from vitos.core.sparsify import Fusion
from vitos.core.stopwatch import Stopwatch
from vitos.eval.selectors import SELECTORS, Task
from vitos.eval.selectors.attention import text_attention
from vitos.eval.selectors.crop import crop, scaled
from vitos.eval.selectors.diversity import relevance
from vitos.eval.selectors.places import uniform_mask
from vitos.policy.plans import get_plan
from vitos.policy.plans.crop import cut_out
from vitos.policy.spec import HeadRule, VitosSpec
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

QUESTION = "<image>Where is the nodule?\nA. left\nB. right"
ENCODING = ("crop", "resize")
MERGING = ("tome", "tome_in_order", "visionzip", "visionzip_mean", "prumerge_plus", "sparsevlm")
# A choice that depends on the budget as a whole: crops, rounds, stages, anchors and pivots per token.
SIZED = ("inverted", "holov", "vispruner", "hiprune", "dart", "dart_in_flight", "pyramiddrop")
BOXES = (Box(0.1, 0.1, 0.4, 0.5), Box(0.6, 0.7, 0.8, 0.9))


@pytest.fixture(scope="module")
def make_task(picture):
    def make(name="qwen2_5_vl, nano", *, size=(120, 160), boxes=BOXES, gold=BOXES[:1], record_id="q1", seed=0):
        backbone = copy.copy(FAMILIES_BY_NAME[name].backbone())
        backbone.evidence_head = EvidenceHead(backbone.model.config.get_text_config().hidden_size, 8)
        policy = SparseVLM(backbone, VitosSpec(evidence_head=HeadRule(after=1)))
        image = picture(*size)
        record = Record(record_id, (), QUESTION, "A", gold)
        query = Query(policy.encode(image), QUESTION)
        return Task(policy, query, record, boxes=boxes, seed=seed, image=lambda: image)

    return make


@pytest.fixture(scope="module")
def task(make_task):
    return make_task()


@pytest.mark.parametrize("name", SELECTORS)
def test_every_budget_is_met_exactly(name, task):
    total = task.grid.num_tokens
    for count in (1, 2, total // 4, total // 2, round(0.77 * total), total):
        if name in ENCODING and count < 4:
            continue  # nano's image processor makes at least four tokens
        choice = SELECTORS[name].choose(task, count)
        if name in ENCODING:
            assert 0.7 * count <= choice.count <= count
        else:
            assert choice.count == count, count
            assert choice.mask.shape == (total,)


@pytest.mark.parametrize("name", [n for n in SELECTORS if n not in (*ENCODING, *MERGING, *SIZED)])
def test_a_smaller_budget_is_part_of_a_larger_one(name, task):
    total, inside = task.grid.num_tokens, None
    for count in range(1, total + 1, 3):
        mask = SELECTORS[name].choose(task, count).mask
        assert inside is None or not (inside & ~mask).any()
        inside = mask


def left(prompt):
    """Embeddings of the visual tokens that are not dropped on the way."""
    return prompt.embeddings if prompt.hidden is None else prompt.embeddings[~prompt.hidden[prompt.is_visual]]


@pytest.mark.parametrize("name", SELECTORS)
def test_the_model_sees_what_was_chosen(name, task):
    """As many placeholders as tokens; plain droppers leave the kept embeddings as they are, at their positions."""
    count = task.grid.num_tokens // 2
    choice = SELECTORS[name].choose(task, count)
    prompt = task.prompt_of(choice)
    assert int(prompt.is_visual.sum()) == len(prompt.embeddings)
    assert len(left(prompt)) == choice.count
    if choice.visual is None and choice.prompt is None and choice.fusion == Fusion("none"):
        kept = torch.from_numpy(choice.mask)
        torch.testing.assert_close(prompt.embeddings, task.visual.embeddings[kept])
        visual_positions = task.prompt.position_ids[:, task.prompt.is_visual]
        torch.testing.assert_close(prompt.position_ids[:, prompt.is_visual], visual_positions[:, kept])
    if name in ("policy", "oracle", "inverted", "random", "centre", "uniform"):
        assert choice.fusion is None  # as the policy was trained
        mask = torch.from_numpy(choice.mask)
        torch.testing.assert_close(prompt.embeddings, task.prompt.sparse([mask], Fusion()).embeddings)


def test_everything_kept_is_the_dense_prompt(task):
    for name in SELECTORS:
        if name in (*ENCODING, "prumerge_plus"):  # PruMerge adds neighbours to every token, at any budget
            continue
        choice = SELECTORS[name].choose(task, task.grid.num_tokens)
        torch.testing.assert_close(task.prompt_of(choice).embeddings, task.prompt.embeddings)


@pytest.mark.parametrize("name", MERGING)
def test_merged_tokens_enter_every_visual_stream(name, make_task):
    task = make_task("qwen3_vl", size=(250, 200))
    choice = SELECTORS[name].choose(task, task.grid.num_tokens // 3)
    prompt = task.prompt_of(choice)
    assert prompt.streams
    assert {len(stream) for stream in prompt.streams} == {choice.count}
    kept = torch.from_numpy(choice.mask)
    for stream, whole in zip((prompt.embeddings, *prompt.streams), task.visual.tensors, strict=True):
        assert not torch.allclose(stream, whole[kept])
        if name in (
            "tome",
            "tome_in_order",
        ):  # all tokens are in some mixture, so that sums weighted by sizes are those of all tokens
            assert bool((stream.min(0).values >= whole.min(0).values - 1e-4).all())


def test_places(task):
    """Own, oracle and inverted boxes against the rule of `fit_budget` and the boxes' cells."""
    grid, total = task.grid, task.grid.num_tokens
    count = total // 4
    np.testing.assert_array_equal(SELECTORS["policy"].choose(task, count).mask, fit_budget(grid, BOXES, count))
    np.testing.assert_array_equal(SELECTORS["oracle"].choose(task, count).mask, fit_budget(grid, BOXES[:1], count))
    evidence = grid.overlapping(BOXES)
    for count in range(1, total + 1):
        mask = SELECTORS["inverted"].choose(task, count).mask
        assert mask.sum() == count
        assert (mask & evidence).sum() == max(0, count - (~evidence).sum())


def test_random_tokens_depend_on_seed_and_question_only(make_task):
    def mask(**changes):
        return SELECTORS["random"].choose(make_task(**changes), 8).mask.tolist()

    assert mask() == mask(boxes=())
    assert mask() != mask(seed=1)
    assert mask() != mask(record_id="q2")


def test_without_boxes(make_task):
    task = make_task(boxes=(), gold=None)
    even = uniform_mask(task.grid, 9)
    for name in ("policy", "inverted"):
        choice = SELECTORS[name].choose(task, 9)
        assert choice.fallback
        np.testing.assert_array_equal(choice.mask, even)
    assert SELECTORS["oracle"].choose(task, 9) is None
    assert SELECTORS["crop"].choose(task, 9).fallback
    assert not SELECTORS["divprune"].choose(task, 9).fallback


@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_a_uniform_choice_leaves_no_hole(rows, cols, data):
    """Every cell lies near a kept one: within the radius at which that many discs could cover the grid twice over."""
    count = data.draw(st.integers(1, rows * cols))
    grid = TokenGrid.single(rows, cols)
    mask = uniform_mask(grid, count)
    assert mask.sum() == count
    centres = grid.centres()
    gap = np.linalg.norm(centres[:, None] - centres[mask][None], axis=-1).min(1).max()
    kept = centres[mask]
    apart = np.linalg.norm(kept[:, None] - kept[None], axis=-1) + 9 * np.eye(count)
    assert gap <= apart.min() + 1e-9 or count == 1  # the farthest-point property: no hole is wider than the spacing


def test_a_uniform_choice_takes_padding_last():
    grid = TokenGrid.single(6, 6, Rect(0, -0.5, 1, 1.5))
    inside = grid.overlapping([Box(0, 0, 1, 1)])
    assert not (uniform_mask(grid, int(inside.sum())) & ~inside).any()


@pytest.mark.parametrize("name", [n for n in SELECTORS if n not in ENCODING])
def test_a_policy_that_was_just_trained_is_asked_too(name, make_task):
    """Gradient checkpointing leaves a hook on the model that asks for gradients of the input embeddings."""
    task = make_task()
    policy = copy.copy(task.policy)
    backbone = policy.backbone = copy.copy(policy.backbone)
    model = backbone.model = copy.deepcopy(backbone.model).float().requires_grad_(True)
    expected = SELECTORS[name].choose(replace(task, policy=policy, shared={}), 7)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = SELECTORS[name].choose(replace(task, policy=policy, shared={}), 7)
    assert (found.mask == expected.mask).all()


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "llava, LLaVA-1.5", "internvl"])
def test_fastv_ranks_by_the_eager_model_s_attention(name, make_task):
    task = make_task(name, size=(90, 131))
    backbone, prompt = task.policy.backbone, task.prompt
    from vitos.core.prompt import pad_prompts

    inputs = backbone.model_inputs(pad_prompts([prompt], backbone.pad_token_id))
    backbone.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = backbone.model(**inputs, use_cache=False, output_attentions=True).attentions[1]
    finally:
        backbone.model.set_attn_implementation("sdpa")
    expected = weights[0].float().mean(0)[-1][prompt.is_visual]
    torch.testing.assert_close(text_attention(task), expected, atol=1e-6, rtol=1e-4)
    mask = SELECTORS["fastv"].choose(task, 5).mask
    assert expected[torch.from_numpy(mask)].min() >= expected[torch.from_numpy(~mask)].max()


def test_question_similarity_by_loops(task):
    backbone = task.policy.backbone
    ids = backbone.tokenizer("Where is the nodule?\nA. left\nB. right", add_special_tokens=False)["input_ids"]
    words = backbone.model.get_input_embeddings().weight[ids].detach().double().numpy()
    visual = task.visual.embeddings.double().numpy()
    expected = [np.mean([v @ w / np.linalg.norm(v) / np.linalg.norm(w) for w in words]) for v in visual]
    np.testing.assert_allclose(relevance(task).numpy(), expected, atol=1e-5)


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 60))
def test_a_crop_has_the_boxes_pixels_and_fits_its_budget(width, height, count):
    values = np.arange(100 * 80).reshape(80, 100).astype(np.int32)
    box = Box(0, 0, width, height)
    piece = scaled(cut_out(Image.fromarray(values, mode="I"), box, WHOLE_IMAGE), count, 4)
    cols, rows = piece.width // 4, piece.height // 4
    assert rows * cols <= count < rows * cols + rows  # no further column would fit
    assert np.asarray(piece).max() <= values[: int(np.ceil(height * 80)), : int(np.ceil(width * 100))].max() + 200


@given(st.integers(1, 2000), st.integers(1, 4000), st.integers(1, 1500))
def test_a_crop_is_never_longer_than_an_encoder_accepts(width, height, count):
    """Qwen's image processor refuses a side ratio above 200, which a thin box and a large budget would give."""
    piece = scaled(Image.new("L", (width, height)), count, 1)
    assert piece.width * piece.height <= count
    assert max(piece.size) <= 200 * min(piece.size)


def test_a_crop_of_a_cropped_picture_is_cut_where_the_box_is(make_task, monkeypatch, picture):
    """Boxes are in fractions of the stored image, of which the encoder saw the lower half here."""
    whole = picture(160, 120)
    task = make_task(size=(80, 120))
    lower = whole.crop((0, 80, 120, 160))
    visual = task.visual.within(Rect(0, 0.5, 1, 1))
    query = replace(task.query, scan=replace(task.query.scan, visuals=(visual,)))
    seen = []
    monkeypatch.setattr("vitos.eval.selectors.crop.scaled", lambda piece, count, side: seen.append(piece) or piece)
    box = Box(0.25, 0.5, 0.75, 0.75)
    SELECTORS["crop"].choose(Task(task.policy, query, task.record, boxes=[box], image=lambda: lower), 9)
    np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(whole.crop((30, 80, 90, 120))))


def test_the_evidence_head_chooses_as_in_its_plan(make_task):
    """`one_pass` drops tokens behind the head's layer, `evidence_head` before the first one."""
    task = make_task()
    finding = task.policy.answer([replace(task.query, budget=0.25)], plan="one_pass")[0]
    for name, after in (("one_pass", 1), ("evidence_head", None)):
        choice = SELECTORS[name].choose(task, finding.kept.count)
        np.testing.assert_array_equal(choice.mask, finding.kept.mask)
        prompt = task.prompt_of(choice)
        assert (prompt.after, prompt.cached_length) == (after, len(task.prompt) - (~choice.mask).sum())
    plain = SELECTORS["one_pass"].refusal(FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone())
    assert "'one_pass': the checkpoint has no evidence head" in plain
    assert "one resolution" in SELECTORS["glance"].refusal(make_task("llava, LLaVA-1.5").policy.backbone)


def test_glance_is_its_plan(make_task, picture):
    """Same cells, embeddings and positions as in an answer of the plan, for one image and for two."""
    task = make_task()
    policy, other = task.policy, picture(90, 90, 1)
    question = "<image><image>Which?\nA. 1\nB. 2"
    query = Query(policy.encode(task.image(), other), question)
    record = replace(task.record, question=question)
    two = Task(policy, query, record, boxes=BOXES, image=task.image, others=(lambda: other,))
    for one, images in ((task, [task.image()]), (two, [task.image(), other])):
        scan = policy.encode(*images, plan="glance")
        plan = get_plan("glance")
        (ready,) = plan.prepare(policy.branches, policy.engine, [Query(scan, one.query.question)], Stopwatch())
        (expected,) = plan.reason(policy.branches, replace(ready, budget=0.25), [()], Stopwatch())
        choice = SELECTORS["glance"].choose(one, round(0.25 * one.grid.num_tokens))
        seen = one.prompt_of(choice)
        np.testing.assert_array_equal(choice.mask, expected.kept.mask)
        assert torch.equal(seen.embeddings, expected.prompt.embeddings)
        assert torch.equal(seen.position_ids, expected.prompt.position_ids)
        assert choice.count == round(0.25 * one.grid.num_tokens)


def test_refusals(make_task):
    llava, gemma = (FAMILIES_BY_NAME[n].backbone() for n in ("llava, LLaVA-1.5", "gemma3"))
    assert "'crop' encodes images of a few tokens, but Llava" in SELECTORS["crop"].refusal(llava)
    assert "'visionzip' needs encoder attention, which Gemma3" in SELECTORS["visionzip"].refusal(gemma)
    assert SELECTORS["visionzip"].refusal(llava) is None
    assert not any(selector.refusal(make_task().policy.backbone) for selector in SELECTORS.values())
    task = make_task()
    processor = task.policy.backbone.image_processor
    before = dict(processor.size)
    processor.size = before | {"shortest_edge": 64 * 64 * 4}
    try:
        assert crop(task, 4).count > 4
        assert SELECTORS["crop"].choose(task, 4) is None
        assert SELECTORS["crop"].choose(task, 1000).count > 4
    finally:
        processor.size = before


def test_several_images_share_one_budget(make_task, picture):
    """Tokens of all images compete; a selector that sees one image through the encoder is not defined."""
    task = make_task()
    policy = task.policy
    query = Query(policy.encode(picture(120, 160), picture(90, 90, 1)), "<image><image>Which?\nA. 1\nB. 2")
    second = partial(picture, 90, 90, 1)
    two = Task(
        policy,
        query,
        replace(task.record, question=query.question),
        boxes=BOXES,
        image=task.image,
        others=[second],
    )
    for name, selector in SELECTORS.items():
        choice = selector.choose(two, 6)
        if {"encoder_attention", "any_resolution"} & set(selector.needs):
            assert choice is None, name
        else:
            assert len(left(two.prompt_of(choice))) == choice.count == 6, name
