"""Visual tokens that leave a prompt behind layer k, against the unmodified library.

The library gets pixels through the family's own processor, and each of its layers a mask that is written out here:
up to layer k a prompt sees all of itself, behind it nothing sees a dropped token, and generated tokens never do.
"""

import contextlib

import pytest
import torch
from tests.backbones.families import FAMILIES, FAMILIES_BY_NAME
from tests.backbones.family import library_inputs, library_run
from tests.backbones.family_gemma3 import gemma3

from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling
from vitos.engines.continuous_batching import RunningBatch
from vitos.engines.in_flight import run_early
from vitos.engines.torch_engine import TorchEngine

TEXT = "Look: <image> Which kind is it?"
TOKENS = 5
NANO = "qwen2_5_vl, nano"

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def dense_prompts(backbone, images, texts=(TEXT, TEXT)):
    with torch.no_grad():
        visuals = [backbone.encode([image])[0] for image in images]
    return [backbone.build_prompt(text, [visual]) for text, visual in zip(texts, visuals, strict=False)]


def third(prompt, shift=0):
    return (torch.arange(len(prompt.embeddings)) + shift) % 3 == 0


def layers_of(backbone):
    return len(backbone.language_model.layers)


def sample(backbone, prompts, tokens=TOKENS, prefixes=None):
    rows = TorchEngine(backbone).sample(prompts, Sampling(tokens), [[0]] * len(prompts), prefixes=prefixes)
    return [row[0] for row in rows]


@contextlib.contextmanager
def masked_layers(layers, mask_of):
    """Each layer of the library's model sees what it would see, and what `mask_of(layer)` allows, bool (T, T)."""

    def hook(index):
        def replace(_, args, kwargs):
            own = kwargs["attention_mask"]
            allowed = mask_of(index)[None, None]
            own = torch.ones_like(allowed).tril() if own is None else own
            return args, kwargs | {"attention_mask": own & allowed}

        return replace

    hooks = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def brute_force(family, image, mask, after, extra_ids):
    """Log-probabilities (L, vocab) of `extra_ids` from one forward pass from pixels, with a mask for each layer."""
    backbone = family.backbone()
    inputs = library_inputs(family.processor(), TEXT, [image], extra_ids)
    _, positions = library_run(backbone, inputs)
    visual = (inputs["input_ids"][0] == backbone.model.config.image_token_id).nonzero()[:, 0]
    dropped, length = visual[~mask].tolist(), inputs["input_ids"].shape[1]

    def mask_of(layer):
        allowed = torch.ones(length, length, dtype=torch.bool)
        allowed[(length - len(extra_ids)) * (layer < after) :, dropped] = False
        return allowed | torch.eye(length, dtype=torch.bool)

    positions = positions[:, None] if len(positions) > 1 else positions
    with masked_layers(backbone.model.model.language_model.layers, mask_of):
        logits = backbone.model(**inputs | {"position_ids": positions}).logits[0]
    logits = logits[-len(extra_ids) - 1 : -1].clone()
    logits[:, list(backbone.banned_token_ids)] = float("-inf")
    return logits.log_softmax(-1)


@every_family
@torch.no_grad()
def test_pruned_layers_are_the_unmodified_model_with_a_mask_for_each_layer(family, picture):
    """Sampling in one batch of different images and kept counts, and packed scoring."""
    backbone, images = family.backbone(), [picture(*size) for size in family.sizes[:2]]
    dense = dense_prompts(backbone, images)
    masks = [third(prompt, shift) for shift, prompt in enumerate(dense)]
    for after in {1, layers_of(backbone) - 1}:
        prompts = [prompt.prune([mask], after) for prompt, mask in zip(dense, masks, strict=True)]
        rows = sample(backbone, prompts)
        scored = TorchEngine(backbone).score(prompts, [[row.token_ids] for row in rows]).logprobs
        for index, (row, mask, image) in enumerate(zip(rows, masks, images, strict=True)):
            expected = brute_force(family, image, mask, after, row.token_ids.tolist())
            assert expected.argmax(-1).tolist() == row.token_ids.tolist()
            chosen = expected.gather(-1, row.token_ids[:, None])[:, 0].float()
            torch.testing.assert_close(row.logprobs, chosen, rtol=0, atol=1e-5)
            torch.testing.assert_close(scored[index, : len(chosen)], chosen, rtol=0, atol=1e-5)


@every_family
@torch.no_grad()
def test_the_ends_are_the_dense_and_the_sparse_prompt(family, picture):
    """Keeping all is the dense prompt at every depth; k = 0 is the sparse prompt, unfused; k = L reads densely."""
    backbone = family.backbone()
    dense = dense_prompts(backbone, [picture(*size) for size in family.sizes[:2]])
    masks = [third(prompt, shift) for shift, prompt in enumerate(dense)]
    expected = sample(backbone, dense)
    for after in range(layers_of(backbone) + 1):
        same(sample(backbone, [p.prune([torch.ones(len(p.embeddings)) > 0], after) for p in dense]), expected)
    sparse = [p.sparse([mask], Fusion("none")) for p, mask in zip(dense, masks, strict=True)]
    in_flight = [
        [p.prune([m], after) for p, m in zip(dense, masks, strict=True)] for after in (0, layers_of(backbone))
    ]
    same(sample(backbone, in_flight[0]), sample(backbone, sparse))
    same(sample(backbone, in_flight[1], 1), sample(backbone, dense, 1))
    # The test can see a fault: where tokens leave makes a difference.
    first = sample(backbone, in_flight[0], 1)[0].logprobs - sample(backbone, dense, 1)[0].logprobs
    assert first.abs().max() > 1e-4


def same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_window_counts_the_tokens_that_are_left(picture):
    """Gemma 3 with a window shorter than its image: scoring finds what sampling wrote."""
    backbone = gemma3(sliding_window=12)
    (dense,) = dense_prompts(backbone, [picture(90, 131)], (TEXT,))
    for after in (0, 1, 2, 3):
        prompt = dense.prune([third(dense)], after)
        (row,) = sample(backbone, [prompt], 8)
        scored = TorchEngine(backbone).score([prompt], [[row.token_ids]]).logprobs[0]
        torch.testing.assert_close(scored, row.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [NANO, "qwen3_vl", "llava, LLaVA-1.5", "internvl"])
@torch.no_grad()
def test_questions_share_the_first_layers_of_their_image(name, picture):
    family = FAMILIES_BY_NAME[name]
    backbone = family.backbone()
    engine, image = TorchEngine(backbone), picture(*family.sizes[0])
    prompts = dense_prompts(backbone, [image, image], (TEXT, TEXT + " Is it large?"))
    pruned = [p.prune([third(p, shift)], 1) for shift, p in enumerate(prompts)]
    head = prompts[0].head(prompts[0].prefix_length)
    (shared,) = run_early(engine, [head], [None], 1)
    assert len(shared.layers) == 1
    assert shared.states.shape == (len(head), dense_size(backbone))
    expected = sample(backbone, pruned)
    same(sample(backbone, pruned, prefixes=[shared, shared]), expected)
    whole = run_early(engine, prompts, [shared, None], 1)
    same(sample(backbone, pruned, prefixes=whole), expected)
    with pytest.raises(ValueError, match="another prompt, image or model"):
        sample(backbone, [prompts[0].prune([third(prompts[0])], 2)], prefixes=[shared])
    with pytest.raises(ValueError, match="another prompt, image or model"):
        sample(backbone, [pruned[1]], prefixes=[whole[0]])


def dense_size(backbone):
    return backbone.model.config.get_text_config().hidden_size


@torch.no_grad()
def test_rows_join_and_leave_a_running_batch(picture):
    backbone = FAMILIES_BY_NAME[NANO].backbone()
    dense = dense_prompts(backbone, [picture(90, 131), picture(250, 40)])
    prompts = [dense[0].prune([third(dense[0])], 2), dense[1].prune([third(dense[1], 1)], 1), dense[0]]
    expected, batch, found = sample(backbone, prompts, 6), RunningBatch(TorchEngine(backbone)), {}
    for key, prompt in enumerate(prompts):
        batch.join(key, prompt, Sampling(6))
        found |= {w.key: w.completion for w in batch.step() if w.completion}
    while len(batch):
        found |= {w.key: w.completion for w in batch.step() if w.completion}
    same([found[key] for key in range(3)], expected)


@torch.no_grad()
def test_siblings_share_the_pruned_prompt(picture):
    backbone = FAMILIES_BY_NAME[NANO].backbone()
    (dense,) = dense_prompts(backbone, [picture(90, 131)], (TEXT,))
    prompt, engine = dense.prune([third(dense)], 2), TorchEngine(backbone)
    together = engine.sample([prompt], Sampling(TOKENS, 1.0), [[1, 2, 3]])[0]
    assert len({tuple(row.token_ids.tolist()) for row in together}) > 1
    for seed, row in zip((1, 2, 3), together, strict=True):
        same(engine.sample([prompt], Sampling(TOKENS, 1.0), [[seed]])[0], [row])
    scored = engine.score([prompt], [[row.token_ids for row in together]]).logprobs
    for got, row in zip(scored, together, strict=True):
        torch.testing.assert_close(got[: len(row.logprobs)], row.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [NANO, "gemma3"])
def test_gradients_are_those_of_the_masked_model(name, picture):
    """With and without gradient checkpointing, which runs the layers a second time."""
    family, after = FAMILIES_BY_NAME[name], 1
    backbone, image = family.backbone(), picture(*family.sizes[0])
    (dense,) = dense_prompts(backbone, [image], (TEXT,))
    mask = third(dense)
    prompt = dense.prune([mask], after)
    ids = sample(backbone, [prompt])[0].token_ids
    names = [n for n, p in backbone.model.named_parameters() if "language_model" in n]
    weights = [p for n, p in backbone.model.named_parameters() if n in set(names)]
    with torch.enable_grad():
        expected = torch.autograd.grad(
            brute_force(family, image, mask, after, ids.tolist()).gather(-1, ids[:, None]).sum(), weights
        )
    for checkpointing in (False, True):
        if checkpointing:
            backbone.model.train()
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            total = TorchEngine(backbone).score([prompt], [[ids]]).logprobs.sum()
            found = torch.autograd.grad(total, weights)
        finally:
            backbone.model.gradient_checkpointing_disable()
            backbone.model.disable_input_require_grads()
            backbone.model.eval()
        for which, ours, theirs in zip(names, found, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1), which
