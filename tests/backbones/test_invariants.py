"""The invariants of docs/method.md, section 4, for every family of `families.py`, against the unmodified library.

The library gets pixels through the family's own processor and computes placeholders, visual tokens and positions
itself. For a sparse prompt, it is told only which tokens of the dense sequence are hidden from all others.
"""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.backbones.families import FAMILIES
from tests.backbones.family import library_inputs, library_run

from vitos.backbones import family_of, load_backbone
from vitos.core.geometry import Box, TokenGrid
from vitos.core.prompt import VisualTokens, pad_prompts
from vitos.core.sparsify import Fusion, KeepRule, select
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine

LAYOUTS = {
    "image first": ("<image>What is shown?", 1),
    "text around": ("Look here: <image> Which quadrant?", 1),
    "image last": ("What is this?<image>", 1),
    "three images": ("A <image> and <image><image> differ?", 3),
    "no image": ("What is a cyst?", 0),
}
BOXES = [Box(0.1, 0.15, 0.3, 0.4), Box(0.55, 0.5, 0.6, 0.9)]
NONE = Fusion("none")

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def backbone(family):
    return family.backbone()


@pytest.fixture
def library(family):
    """`library(text, images, extra_ids)`: inputs of the unmodified model, made by the family's own processor."""
    processor = family.processor()
    return lambda text, images, extra_ids=(): library_inputs(processor, text, images, extra_ids)


@torch.no_grad()
def run(backbone, prompts, side="left"):
    """Logits of each prompt's tokens, without padding."""
    batch = pad_prompts(prompts, backbone.pad_token_id, side)
    logits = backbone.model(**backbone.model_inputs(batch)).logits
    return [row[mask.bool()] for row, mask in zip(logits, batch.attention_mask, strict=True)]


def encode(backbone, images):
    with torch.no_grad():
        return backbone.encode(images)


def same(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def needs(backbone, count):
    if count > 1 and not backbone.capabilities.several_images:
        pytest.skip("takes one image in a prompt; its refusal is tested")


# --- keep all: the unmodified model ---------------------------------------------------------------------------------


@every_layout
def test_prompt_is_what_the_library_makes_of_the_chat(family, backbone, library, picture, layout):
    text, count = LAYOUTS[layout]
    needs(backbone, count)
    images = [picture(*size) for size in family.sizes[:count]]
    prompt = backbone.build_prompt(text, encode(backbone, images))
    inputs = library(text, images)
    assert torch.equal(prompt.input_ids, inputs["input_ids"][0])
    assert torch.equal(prompt.is_visual, inputs["input_ids"][0] == backbone.model.config.image_token_id)
    _, positions = library_run(backbone, library(text, images, extra_ids=[20]))
    assert torch.equal(prompt.position_ids, positions[:, :-1])
    assert positions[:, -1].tolist() == [prompt.next_position] * len(positions)


@every_layout
def test_keep_all_gives_the_logits_of_the_unmodified_model(family, backbone, library, picture, layout):
    text, count = LAYOUTS[layout]
    needs(backbone, count)
    turns = len(family.sizes) if count else 1
    for turn in range(turns):
        sizes = (family.sizes[turn:] + family.sizes[:turn])[:count]
        images = [picture(*size) for size in sizes]
        expected, _ = library_run(backbone, library(text, images))
        (logits,) = run(backbone, [backbone.build_prompt(text, encode(backbone, images))])
        same(logits, expected)
        assert expected.std() > 0.1  # a model whose logits say nothing would agree with anything


def test_keep_all_gives_the_greedy_tokens_of_the_unmodified_model(family, backbone, library, picture):
    """Our engine runs all image sizes in one batch, `generate` one at a time."""
    text, images = LAYOUTS["text around"][0], [picture(*size) for size in family.sizes]
    prompts = [backbone.build_prompt(text, [visual]) for visual in encode(backbone, images)]
    sampled = TorchEngine(backbone).sample(prompts, Sampling(10), [[0]] * len(prompts))
    rows = [completion.token_ids.tolist() for (completion,) in sampled]
    for row, image in zip(rows, images, strict=True):
        inputs = library(text, [image])
        generated = backbone.model.generate(
            **inputs, max_new_tokens=10, do_sample=False, suppress_tokens=list(backbone.banned_token_ids)
        )
        assert row == generated[0, inputs["input_ids"].shape[1] :].tolist()
    assert len({tuple(row) for row in rows}) > 1  # the image matters


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_of_unlike_images_is_each_alone(family, backbone, library, picture, side):
    images = [picture(*size) for size in family.sizes]
    visuals = encode(backbone, images)  # the encoder runs once over all of them, too
    texts = [f"{'Look: ' * k}<image>What is shown?" for k in range(len(images))]
    prompts = [backbone.build_prompt(text, [visual]) for text, visual in zip(texts, visuals, strict=True)]
    for logits, text, image in zip(run(backbone, prompts, side), texts, images, strict=True):
        same(logits, library_run(backbone, library(text, [image]))[0])


def test_grayscale_image_is_read_as_the_library_reads_it(family, backbone, library, picture):
    gray = picture(*family.sizes[0]).convert("L")
    expected, _ = library_run(backbone, library("<image>What is shown?", [gray]))
    prompt = backbone.build_prompt("<image>What is shown?", encode(backbone, [gray.convert("RGB")]))
    same(run(backbone, [prompt])[0], expected)


def test_several_images_are_taken_or_refused(family, backbone, picture):
    visuals = encode(backbone, [picture(*size) for size in family.sizes[:2]])
    if backbone.capabilities.several_images:
        prompt = backbone.build_prompt("<image> and <image>?", visuals)
        assert int(prompt.is_visual.sum()) == sum(v.grid.num_tokens for v in visuals)
    else:
        with pytest.raises(ValueError, match=f"{type(backbone).__name__} takes one image in a prompt, got 2"):
            backbone.build_prompt("<image> and <image>?", visuals)


# --- sparse: the dense model with an attention mask -----------------------------------------------------------------


@pytest.mark.parametrize("text", ["<image>What is it?", "Here <image> what is it?", "See <image> or <image> now?"])
def test_sparse_is_dense_with_the_dropped_tokens_hidden(family, backbone, library, picture, text):
    count = text.count("<image>")
    needs(backbone, count)
    images = [picture(*size) for size in family.sizes[:count]]
    visuals = encode(backbone, images)
    masks = [torch.from_numpy(select(v.grid, BOXES, KeepRule()).mask) for v in visuals]
    assert all(0 < int(mask.sum()) < len(mask) for mask in masks)
    assert int(masks[0].sum()) < len(masks[0]) / 2
    dense = backbone.build_prompt(text, visuals)
    keep = torch.ones(len(dense), dtype=torch.bool)
    keep[dense.is_visual] = torch.cat(masks)
    expected = hidden_run(backbone, library(text, images), keep)
    same(run(backbone, [dense.sparse(masks, NONE)])[0], expected)

    # The test can see a fault: each of these changes the logits by far more than the tolerance.
    (whole,) = run(backbone, [dense])
    (renumbered,) = run(backbone, [dense.sparse(masks, NONE, renumber=True)])
    (fused,) = run(backbone, [dense.sparse(masks, Fusion("mean"))])
    for other in (whole, renumbered, fused):
        assert (other[-1] - expected[-1]).abs().max() > 1e-3


def test_an_image_may_keep_no_token_at_all(family, backbone, library, picture):
    """Its number and its marks stay; the logits are those of the dense model that does not see its tokens."""
    needs(backbone, 2)
    text, images = "Image 1: <image> Image 2: <image> Which?", [picture(*size) for size in family.sizes[:2]]
    visuals = encode(backbone, images)
    dense = backbone.build_prompt(text, visuals)
    for empty in (0, 1):
        masks = [torch.zeros(v.grid.num_tokens, dtype=torch.bool) for v in visuals]
        masks[1 - empty] = torch.from_numpy(select(visuals[1 - empty].grid, BOXES, KeepRule()).mask)
        keep = torch.ones(len(dense), dtype=torch.bool)
        keep[dense.is_visual] = torch.cat(masks)
        expected = hidden_run(backbone, library(text, images), keep)
        same(run(backbone, [dense.sparse(masks, NONE)])[0], expected)


def hidden_run(backbone, inputs, keep):
    """Logits of the unmodified model from pixels, at its own positions, with the dropped tokens hidden from all."""
    _, positions = library_run(backbone, inputs)
    positions = positions[:, None] if len(positions) > 1 else positions
    logits, _ = library_run(backbone, inputs | {"attention_mask": keep[None].long(), "position_ids": positions})
    return logits[keep]


def test_decoding_a_sparse_prompt_is_one_full_forward(family, backbone, library, picture):
    """The dense model from pixels, with dropped tokens hidden, has each sampled token and its log-probability."""
    text, images = LAYOUTS["text around"][0], [picture(*size) for size in family.sizes]
    dense = [backbone.build_prompt(text, [visual]) for visual in encode(backbone, images)]
    masks = [(torch.arange(len(prompt.embeddings)) + shift) % 3 == 0 for shift, prompt in enumerate(dense)]
    sparse = [prompt.sparse([mask], NONE) for prompt, mask in zip(dense, masks, strict=True)]
    sampled = TorchEngine(backbone).sample(sparse, Sampling(8), [[0]] * len(sparse))
    for prompt, mask, image, (completion,) in zip(dense, masks, images, sampled, strict=True):
        tokens = completion.token_ids
        keep = torch.ones(len(prompt) + len(tokens), dtype=torch.bool)
        keep[: len(prompt)][prompt.is_visual] = mask
        logits = hidden_run(backbone, library(text, [image], tokens.tolist()), keep)[-len(tokens) - 1 : -1]
        logits[:, list(backbone.banned_token_ids)] = float("-inf")
        logprobs = logits.log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == tokens.tolist()
        same(completion.logprobs, logprobs.gather(-1, tokens[:, None])[:, 0].float(), tolerance=1e-5)


def test_packed_siblings_are_scored_as_the_unmodified_model_scores_each(family, backbone, library, picture):
    """Dense and sparse prompts in one batch, each with two completions of different length."""
    text, images = LAYOUTS["text around"][0], [picture(*size) for size in family.sizes[:2]]
    dense = [backbone.build_prompt(text, [visual]) for visual in encode(backbone, images)]
    mask = torch.arange(len(dense[1].embeddings)) % 3 == 0
    prompts = [dense[0], dense[1].sparse([mask], NONE)]
    allowed = torch.tensor(sorted(set(range(len(backbone.tokenizer))) - set(backbone.banned_token_ids)))
    siblings = [allowed[:7], allowed[-4:]]
    with torch.no_grad():
        rows = iter(TorchEngine(backbone).score(prompts, [siblings, siblings]).logprobs)
    for prompt, kept, image in zip(dense, (torch.ones(len(dense[0].embeddings)) > 0, mask), images, strict=True):
        for tokens in siblings:
            keep = torch.ones(len(prompt) + len(tokens), dtype=torch.bool)
            keep[: len(prompt)][prompt.is_visual] = kept
            logits = hidden_run(backbone, library(text, [image], tokens.tolist()), keep)[-len(tokens) - 1 : -1]
            logits[:, list(backbone.banned_token_ids)] = float("-inf")
            expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].float()
            same(next(rows)[: len(tokens)], expected, tolerance=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sparse_and_dense_prompts_share_a_batch(family, backbone, picture, side):
    visuals = encode(backbone, [picture(*size) for size in family.sizes[:2]])
    masks = [torch.arange(v.grid.num_tokens) % 3 == 0 for v in visuals]
    dense = [backbone.build_prompt("<image>What is it?", [v]) for v in visuals]
    prompts = [dense[0].sparse(masks[:1], NONE), dense[0], dense[1].sparse(masks[1:]), dense[1]]
    for together, prompt in zip(run(backbone, prompts, side), prompts, strict=True):
        same(together, run(backbone, [prompt])[0])


def test_extra_streams_are_pruned_like_the_embeddings(family, backbone, picture):
    """DeepStack: every stream keeps the same rows with the same fusion weights, and reaches the model."""
    (visual,) = encode(backbone, [picture(*family.sizes[0])])
    assert bool(visual.streams) == backbone.capabilities.extra_streams
    if not visual.streams:
        pytest.skip("no extra visual streams")
    mask = torch.arange(visual.grid.num_tokens) % 3 == 0
    dense = backbone.build_prompt("<image>What is it?", [visual])
    assert all(
        torch.equal(a, b[mask]) for a, b in zip(dense.sparse([mask], NONE).streams, visual.streams, strict=True)
    )
    # A stream that is a copy of the embeddings must come out of the fusion as they do.
    twin = VisualTokens(
        visual.embeddings, visual.grid, resized=visual.resized, streams=(visual.embeddings,) * len(visual.streams)
    )
    fused = backbone.build_prompt("<image>What is it?", [twin]).sparse([mask])
    assert all(torch.equal(stream, fused.embeddings) for stream in fused.streams)
    (before,) = run(backbone, [dense])
    for index in range(len(visual.streams)):
        streams = tuple(s * (k != index) for k, s in enumerate(visual.streams))
        other = VisualTokens(visual.embeddings, visual.grid, resized=visual.resized, streams=streams)
        (after,) = run(backbone, [backbone.build_prompt("<image>What is it?", [other])])
        assert (after[-1] - before[-1]).abs().max() > 1e-3


# --- where the tokens look ------------------------------------------------------------------------------------------


def test_painted_pixels_change_the_tokens_that_the_grid_names(family, backbone, picture):
    """Brute force: invert the pixels of one cell, and find the visual token that changes most in each view."""
    exact = 0
    for size in family.sizes:
        image = picture(*size)
        (before,) = encode(backbone, [image])
        for painted, box in painted_cells(image, before.grid):
            (after,) = encode(backbone, [painted])
            change = (after.embeddings - before.embeddings).norm(dim=-1)
            named = torch.from_numpy(before.grid.overlapping([box]))
            start = 0
            for view in before.grid.views:
                part = slice(start, start := start + view.num_tokens)
                if named[part].any():
                    assert named[part][change[part].argmax()], (size, box, view)
                    exact += int(named[part].sum()) == 1
    assert exact >= 2 * len(family.sizes)  # most cells contain whole pixels


def painted_cells(image, grid, count=4):
    """Images with the pixels of one cell inverted, and the box of these pixels, for `count` cells of each view."""
    rng = np.random.default_rng([*image.size, grid.num_tokens])
    width, height = image.size
    for view in grid.views:
        cells = view.cell_boxes()
        left = count
        for index in rng.permutation(len(cells)):
            cell = cells[index]
            x1, x2 = inner(cell.x1 * width, cell.x2 * width, width)
            y1, y2 = inner(cell.y1 * height, cell.y2 * height, height)
            if left == 0:
                break
            if x1 >= x2 or y1 >= y2:
                continue  # a cell of the padding
            left -= 1
            pixels = np.array(image)
            pixels[y1:y2, x1:x2] = np.where(pixels[y1:y2, x1:x2] < 128, 255, 0)
            yield Image.fromarray(pixels), Box(x1 / width, y1 / height, x2 / width, y2 / height)


def inner(low, high, size):
    """The whole pixels inside an interval, or the pixel around its middle if there are none."""
    first, last = max(0, int(np.ceil(low - 1e-6))), min(size, int(np.floor(high + 1e-6)))
    if first >= last and 0 < (low + high) / 2 < size:
        first = int((low + high) / 2)
        last = first + 1
    return first, last


# --- text, coordinates, files ---------------------------------------------------------------------------------------


def test_special_tokens_in_user_text_stay_text(family, backbone, picture):
    visuals = encode(backbone, [picture(*family.sizes[0])])
    tokens = [*backbone.tokenizer.all_special_tokens, backbone.visual_token]
    nasty = "".join(token for token in tokens if token != "<image>")  # that one asks for an image in any family
    prompts = [backbone.build_prompt(f"<image>Is it {text}?", visuals) for text in (nasty, "")]
    special = torch.tensor(sorted({*backbone.tokenizer.all_special_ids, backbone.visual_token_id}))
    assert len({int(torch.isin(p.input_ids, special).sum()) for p in prompts}) == 1
    assert [int(p.is_visual.sum()) for p in prompts] == [visuals[0].grid.num_tokens] * 2


def test_placeholders_are_never_sampled_and_an_answer_can_end(backbone):
    assert backbone.visual_token_id in backbone.banned_token_ids
    assert backbone.stop_token_ids
    assert not set(backbone.stop_token_ids) & set(backbone.banned_token_ids)


@given(
    style=st.sampled_from(["normalized", "absolute", "per_mille"]),
    size=st.tuples(st.integers(1, 12000), st.integers(1, 12000)),
    sides=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(max_examples=150)
def test_boxes_come_back_within_half_a_unit(family, style, size, sides):
    """For any image size and box. A box thinner than a unit is written one unit wide, or it would vanish."""
    (x1, x2), (y1, y2) = sorted(sides[::2]), sorted(sides[1::2])
    if x1 == x2 or y1 == y2:
        return
    backbone, box = family.backbone(), Box(x1, y1, x2, y2)
    visual = VisualTokens(torch.zeros(1, 1), TokenGrid.single(1, 1), resized=size)
    written = backbone.write_box(box, visual, style)
    assert all(re.fullmatch(r"[01]\.\d\d" if style == "normalized" else r"\d+", number) for number in written)
    back = backbone.box_reader(visual, style)(tuple(float(number) for number in written))
    assert back is not None
    units = {"normalized": (100, 100), "per_mille": (1000, 1000), "absolute": size}[style]
    for side in range(4):
        low, high = box.as_tuple()[side % 2], box.as_tuple()[side % 2 + 2]
        limit = 0.5 if (high - low) * units[side % 2] > 1 else 1.0
        assert abs(back.as_tuple()[side] - box.as_tuple()[side]) * units[side % 2] <= limit + 1e-6


def test_saved_checkpoint_loads_as_the_same_family(family, backbone, picture, tmp_path):
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, dtype=torch.float64)
    experts = backbone.model.config._experts_implementation
    if experts != loaded.model.config._experts_implementation:
        loaded.model.set_experts_implementation(experts)  # a choice of this process, not part of a checkpoint
    assert type(loaded) is type(backbone) is family_of(backbone.model.config.model_type)
    for name in ("geometry", "banned_token_ids", "stop_token_ids", "visual_token_id", "capabilities"):
        assert getattr(loaded, name) == getattr(backbone, name)
    prompts = [b.build_prompt("<image>What?", encode(b, [picture(*family.sizes[0])])) for b in (loaded, backbone)]
    same(run(loaded, prompts[:1])[0], run(backbone, prompts[1:])[0], tolerance=1e-9)


def test_vision_modules_are_what_makes_the_visual_tokens(family, picture):
    """They are frozen during RL. If other weights had an effect on visual tokens, cached ones would become wrong."""
    backbone = family.backbone()
    parameters = {id(p) for module in backbone.vision_modules for p in module.parameters()}
    (visual,) = backbone.encode([picture(*family.sizes[0])])
    everything = list(backbone.model.parameters())
    total = sum(t.sum() for t in (visual.embeddings, *visual.streams))
    gradients = torch.autograd.grad(total, everything, allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all(id(p) in parameters for p, g in zip(everything, gradients, strict=True) if g is not None)
