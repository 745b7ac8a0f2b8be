"""Gathered keys and values, and prefixes that several prompts share, against the unmodified library.

The library gets pixels through the family's own processor, and a mask that is written out here: tokens behind the
image do not see its dropped tokens, and all other tokens see everything before them.
"""

import pytest
import torch
from tests.backbones.families import FAMILIES, FAMILIES_BY_NAME
from tests.backbones.family import library_inputs, library_run

from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine

TEXT = "Look: <image> Which kind is it?"
TOKENS = 5
WHOLE = [family for family in FAMILIES if not family.name.startswith("gemma3")]

every_family = pytest.mark.parametrize("family", WHOLE, ids=lambda family: family.name)


def dense_prompts(backbone, images, texts):
    with torch.no_grad():
        visuals = [backbone.encode([image])[0] for image in images]
    return [backbone.build_prompt(text, [visual]) for text, visual in zip(texts, visuals, strict=True)]


def brute_force(family, text, image, mask, extra_ids):
    """Log-probabilities (L, vocab) of `extra_ids` from one dense forward pass from pixels, with an explicit mask."""
    backbone = family.backbone()
    inputs = library_inputs(family.processor(), text, [image], extra_ids)
    _, positions = library_run(backbone, inputs)
    visual = (inputs["input_ids"][0] == backbone.model.config.image_token_id).nonzero()[:, 0].tolist()
    dropped = {place for place, kept in zip(visual, mask.tolist(), strict=True) if not kept}
    length = inputs["input_ids"].shape[1]
    seen = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for row in range(length):
        for column in range(row + 1):
            seen[0, 0, row, column] = not (row > visual[-1] and column in dropped)
    positions = positions[:, None] if len(positions) > 1 else positions
    logits = backbone.model(**inputs | {"attention_mask": seen, "position_ids": positions}).logits[0]
    logits = logits[-len(extra_ids) - 1 : -1].clone()
    logits[:, list(backbone.banned_token_ids)] = float("-inf")
    return logits.log_softmax(-1)


def third(prompt, shift=0):
    return (torch.arange(len(prompt.embeddings)) + shift) % 3 == 0


@every_family
@torch.no_grad()
def test_gather_is_the_unmodified_model_with_dropped_tokens_hidden_from_the_text(family, picture):
    """Sampling in one batch of different images, some dense, and packed scoring both equal one dense forward pass."""
    backbone, sizes = family.backbone(), family.sizes[:2]
    images = [picture(*size) for size in sizes]
    dense = dense_prompts(backbone, images, [TEXT] * 2)
    masks = [third(prompt, shift) for shift, prompt in enumerate(dense)]
    prompts = [prompt.gather([mask]) for prompt, mask in zip(dense, masks, strict=True)]
    engine = TorchEngine(backbone)
    rows = [row[0] for row in engine.sample([*prompts, dense[0]], Sampling(TOKENS), [[0]] * 3)]
    scored = engine.score(prompts, [[row.token_ids] for row in rows[:2]]).logprobs
    masks.append(torch.ones_like(masks[0]))
    for index, (row, mask, image) in enumerate(zip(rows, masks, [*images, images[0]], strict=True)):
        expected = brute_force(family, TEXT, image, mask, row.token_ids.tolist())
        assert expected.argmax(-1).tolist() == row.token_ids.tolist()
        chosen = expected.gather(-1, row.token_ids[:, None])[:, 0].float()
        torch.testing.assert_close(row.logprobs, chosen, rtol=0, atol=1e-5)
        if index < 2:
            torch.testing.assert_close(scored[index, : len(chosen)], chosen, rtol=0, atol=1e-5)
    # The test can see a fault: sparse prompts (whose kept tokens never saw the dropped ones) and dense ones differ.
    sparse = dense[0].sparse([masks[0]])
    for other in (dense[0], sparse):
        found = engine.score([other], [[rows[0].token_ids]]).logprobs[0, : len(rows[0].token_ids)]
        assert (found - rows[0].logprobs).abs().max() > 1e-3


def test_gradients_through_the_dense_image_are_those_of_the_masked_model(picture):
    """Two completions of one prompt: the gradient of each weight, for a weighted sum of their log-probabilities."""
    family = FAMILIES_BY_NAME["qwen2_5_vl, nano"]
    backbone, image = family.backbone(), picture(64, 48)
    (dense,) = dense_prompts(backbone, [image], [TEXT])
    mask = third(dense)
    siblings = [torch.tensor([20, 31, 42]), torch.tensor([50, 60])]
    weights = [p for n, p in backbone.model.named_parameters() if "visual" not in n]

    def gradients(loss):
        return torch.autograd.grad(loss, weights)

    scores = TorchEngine(backbone).score([dense.gather([mask])], [siblings])
    found = gradients((scores.logprobs.double() * torch.tensor([[1.0], [-0.5]])).sum())
    loss = 0.0
    for factor, ids in zip((1.0, -0.5), siblings, strict=True):
        logprobs = brute_force(family, TEXT, image, mask, ids.tolist())
        loss = loss + factor * logprobs.gather(-1, ids[:, None]).sum()
    for got, expected in zip(found, gradients(loss), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_family
@torch.no_grad()
def test_a_shared_prefix_changes_nothing_and_runs_once(family, picture, monkeypatch):
    backbone, image = family.backbone(), picture(*family.sizes[0])
    texts = [f"<image>Question {k}{' or so' * k}?" for k in range(3)]
    dense = dense_prompts(backbone, [image] * 3, texts)
    engine = TorchEngine(backbone)
    alone = [engine.sample([prompt], Sampling(TOKENS), [[0]])[0][0] for prompt in dense]
    prefix = engine.prefix(dense[0].head(dense[0].prefix_length))
    ran, call = [], backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **k: ran.append(k["input_ids"].shape) or call(**k))
    together = [row[0] for row in engine.sample(dense, Sampling(TOKENS), [[0]] * 3, prefixes=[prefix] * 3)]
    assert ran[0] == (3, max(len(prompt) for prompt in dense) - len(prefix))
    assert all(shape == (3, 1) for shape in ran[1:])
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_kept_tokens_only(picture):
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    (dense,) = dense_prompts(backbone, [picture(128, 128)], [TEXT])
    engine = TorchEngine(backbone)
    config = backbone.model.config.text_config
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * 32 * 8
    sizes = []
    for prompt in (dense, dense.gather([torch.arange(64) < 5])):
        ((completion,),) = engine.sample([prompt], Sampling(3), [[0]])
        sizes.append(engine.kv_bytes - (len(completion.token_ids) - 1) * per_token)
    assert sizes == [len(dense) * per_token, (len(dense) - 59) * per_token]


@torch.no_grad()
def test_a_prefix_of_another_image_or_model_is_refused(picture):
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    one, other = dense_prompts(backbone, [picture(64, 64), picture(64, 64, seed=1)], [TEXT] * 2)
    engine = TorchEngine(backbone)
    prefix = engine.prefix(one.head(one.prefix_length))
    assert prefix.covers(one, backbone.model)
    assert not prefix.covers(one, object())
    with pytest.raises(ValueError, match="a prefix belongs to another prompt, image or model"):
        engine.sample([other], Sampling(2), [[0]], prefixes=[prefix])
    with pytest.raises(ValueError, match="tokens are hidden"):
        one.gather([third(one)]).head(len(one))


def test_a_sliding_window_is_refused(picture):
    backbone = next(family for family in FAMILIES if family.name.startswith("gemma3")).backbone()
    (dense,) = dense_prompts(backbone, [picture(64, 64)], [TEXT])
    with pytest.raises(ValueError, match="Gemma3 has layers of sliding_attention, whose cache does not hold"):
        TorchEngine(backbone).sample([dense.gather([third(dense)])], Sampling(2), [[0]])


# --- streaming and stop strings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "llava, LLaVA-Med"])
@torch.no_grad()
def test_a_stream_is_the_sample_piece_by_piece(name, picture):
    backbone = FAMILIES_BY_NAME[name].backbone()
    (dense,) = dense_prompts(backbone, [picture(90, 70)], [TEXT])
    engine = TorchEngine(backbone)
    ((expected,),) = engine.sample([dense], Sampling(12), [[0]])
    steps, pieces = engine.stream(dense, Sampling(12)), []
    while True:
        try:
            pieces.append(next(steps))
        except StopIteration as end:
            completion = end.value
            break
    assert "".join(pieces) == completion.text == expected.text
    assert completion.token_ids.tolist() == expected.token_ids.tolist()
    assert len(pieces) > 1


@torch.no_grad()
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(picture):
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    dense = dense_prompts(backbone, [picture(90, 70), picture(40, 200)], [TEXT] * 2)
    engine = TorchEngine(backbone)
    whole = [row[0] for row in engine.sample(dense, Sampling(16), [[0]] * 2)]
    tokenizer, ids = backbone.tokenizer, whole[0].token_ids.tolist()
    texts = [tokenizer.decode(ids[: k + 1], skip_special_tokens=True) for k in range(len(ids))]
    end = next(k for k in range(4, len(ids)) if texts[k][-1:] and texts[k][-3:] not in texts[k - 1])
    stop = texts[end][-3:]
    cut, other = (row[0] for row in engine.sample(dense, Sampling(16, stop=(stop,)), [[0]] * 2))
    assert cut.text == texts[end]
    assert cut.finished
    assert len(cut.token_ids) == end + 1 < len(ids)
    if stop not in whole[1].text:
        assert other.token_ids.tolist() == whole[1].token_ids.tolist()
    with pytest.raises(ValueError, match="stop string must not be empty"):
        Sampling(3, stop=("",))
