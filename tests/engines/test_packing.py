"""Packed scoring against the unmodified model, which runs on each prompt and completion alone, in float32.

The models are a tiny Qwen2.5-VL (M-RoPE) and a tiny LLaVA (1-D positions, one layer with a sliding window). A batch
has dense and sparse prompts of different lengths.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitos.backbones import Capabilities
from vitos.core.prompt import Prompt
from vitos.core.sparsify import Fusion
from vitos.engines.packing import attention_masks, pack
from vitos.engines.torch_engine import TorchEngine

IMAGE, WORDS, HIDDEN = 5, 300, 32
BANNED = (IMAGE, 7)
LENGTHS = ((5, 1, 9), (7, 3), (4,))  # numbers of tokens of the completions of three prompts


def randomly(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(torch.empty_like(weight).normal_(centre, 0.15, generator=generator))
    return model.eval()


def llava(**text):
    """LLaVA on a Qwen2 whose second layer sees only the last 16 tokens."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "vocab_size": WORDS}
    config = LlavaConfig(
        text_config=Qwen2Config(**sizes | heads | window | text),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_id=IMAGE,
    )
    return randomly(LlavaForConditionalGeneration(config))


class OneAxis:
    """The part of a backbone that the engine uses, for positions on one axis."""

    pad_token_id, banned_token_ids, visual_token_id = 0, BANNED, IMAGE
    capabilities = Capabilities(several_images=True, extra_streams=False, native_coordinates="normalized")

    def __init__(self, model):
        self.model = model

    def model_inputs(self, batch):
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids[0],
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=(batch.embeddings,))},
        }


def prompts_of(axes, hidden, visual_token, words):
    """A dense prompt, a sparse one with a fused rest, and a longer dense one; random ids and visual embeddings."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for before, visual, after in ((3, 6, 4), (2, 12, 5), (6, 16, 9)):
        length = before + visual + after
        is_visual = torch.zeros(length, dtype=torch.bool)
        is_visual[before : before + visual] = True
        ids = torch.randint(20, words, (length,), generator=draw).masked_fill(is_visual, visual_token)
        positions = torch.arange(length).expand(axes, -1).clone()
        if axes == 3:  # rows and columns of two, and text that goes on behind the larger of both
            index = torch.arange(visual)
            positions[:, is_visual] = before + torch.stack([0 * index, index // 2, index % 2])
            positions[:, before + visual :] = before + visual // 2 + torch.arange(after)
        embeddings = torch.randn(visual, hidden, generator=draw)
        made.append(
            Prompt(
                input_ids=ids,
                position_ids=positions,
                is_visual=is_visual,
                embeddings=embeddings,
                next_position=int(positions.max()) + 1,
            )
        )
    made[1] = made[1].sparse([torch.arange(12) % 3 == 0], Fusion("weighted"))
    completions = [[torch.randint(20, words, (n,), generator=draw) for n in row] for row in LENGTHS]
    return made, completions


@pytest.fixture(params=["M-RoPE", "1-D"])
def case(request, nano):
    if request.param == "1-D":
        backbone = OneAxis(llava())
        axes, hidden, visual_token, words = 1, HIDDEN, IMAGE, WORDS
    else:
        backbone = copy.copy(nano)
        backbone.model = copy.deepcopy(nano.model).float()
        text = backbone.model.config.text_config
        axes, hidden, visual_token, words = 3, text.hidden_size, backbone.visual_token_id, text.vocab_size
    prompts, completions = prompts_of(axes, hidden, visual_token, words)
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(backbone=backbone, prompts=prompts, completions=completions, weights=weights)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def packed_gradients(case, **engine):
    scores = TorchEngine(case.backbone, **engine).score(case.prompts, case.completions, temperature=0.8)
    assert scores.mask.sum(-1).tolist() == [n for row in LENGTHS for n in row]
    loss = (case.weights * scores.logprobs).sum()
    loss.backward()
    return loss.detach(), scores.logprobs.detach(), gradients(case.backbone.model)


def separate(case):
    """The unmodified model on a batch of one: the loss, its gradients and the log-probabilities."""
    backbone, total, row, rows = case.backbone, torch.zeros(()), 0, []
    for prompt, siblings in zip(case.prompts, case.completions, strict=True):
        for ids in siblings:
            end = (prompt.next_position + torch.arange(len(ids))).expand(prompt.position_ids.shape[0], -1)
            positions = torch.cat([prompt.position_ids, end], dim=1)[:, None]
            out = backbone.model(
                input_ids=torch.cat([prompt.input_ids, ids])[None],
                attention_mask=torch.ones(1, len(prompt) + len(ids), dtype=torch.long),
                position_ids=positions if len(positions) > 1 else positions[0],
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=(prompt.embeddings,))},
                use_cache=False,
            )
            logits = out.logits[0, len(prompt) - 1 : -1] / 0.8
            banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
            banned[list(backbone.banned_token_ids)] = True
            logprobs = logits.masked_fill(banned, -torch.inf).log_softmax(-1)[torch.arange(len(ids)), ids]
            rows.append(logprobs.detach())
            total = total + (case.weights[row, : len(ids)] * logprobs).sum()
            row += 1
    total.backward()
    return total.detach(), rows, gradients(backbone.model)


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((found[name] - value).norm() / value.norm())
        assert difference < tolerance, f"{name}: {difference}"


def test_loss_and_every_gradient_are_those_of_separate_runs(case):
    loss, logprobs, found = packed_gradients(case)
    expected_loss, rows, expected = separate(case)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for got, row in zip(logprobs, rows, strict=True):
        torch.testing.assert_close(got[: len(row)], row, rtol=1e-5, atol=1e-5)
        assert not got[len(row) :].any()
    language = {n for n, _ in case.backbone.model.named_parameters() if "vis" not in n and "projector" not in n}
    assert found.keys() == language
    assert min(float(g.abs().max()) for g in expected.values()) > 0
    assert_close(found, expected)


def test_eager_attention_takes_the_same_mask(case):
    _, _, expected = packed_gradients(case)
    case.backbone.model.set_attn_implementation("eager")
    _, _, found = packed_gradients(case)
    assert_close(found, expected)


def test_a_token_sees_its_prompt_and_itself_only(case):
    """Other siblings, or another number of them, change nothing."""
    engine = TorchEngine(case.backbone)
    with torch.no_grad():
        together = engine.score(case.prompts, case.completions).logprobs
        alone = engine.score(case.prompts[:1], [case.completions[0][2:]]).logprobs
    torch.testing.assert_close(together[2], alone[0], rtol=1e-5, atol=1e-5)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_head_sees_completion_tokens_in_chunks(case, chunk):
    """The result does not depend on the size of the chunks."""
    expected_loss, _, expected = packed_gradients(case)
    sizes = []
    original = torch.nn.functional.linear
    head = case.backbone.model.get_output_embeddings()

    def seen(x, weight, bias=None):
        if weight is head.weight:
            sizes.append(x.shape[:-1].numel())
        return original(x, weight, bias)

    torch.nn.functional.linear = seen
    try:
        loss, _, found = packed_gradients(case, head_tokens=chunk)
    finally:
        torch.nn.functional.linear = original
    tokens = sum(map(sum, LENGTHS))
    assert max(sizes) == min(chunk, tokens)
    assert sum(sizes) == 2 * tokens  # once forward and again backward: no logits are kept in between
    assert "forward" not in vars(head)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_head_whose_run_fails_is_as_it_was(case, hooked):
    """Also if another library has put its own `forward` on it, which then still makes the logits."""
    head = case.backbone.model.get_output_embeddings()
    calls, of_class = [], head.forward
    if hooked:
        head.forward = lambda hidden: calls.append(len(hidden)) or of_class(hidden)
    before = dict(vars(head))

    def failing(**inputs):
        case.backbone.model(**inputs)
        raise RuntimeError("out of memory")

    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        TorchEngine(case.backbone, model=failing).score(case.prompts, case.completions)
    assert vars(head) == before
    assert bool(calls) == hooked
    vars(head).pop("forward", None)


def test_gradient_checkpointing_changes_no_gradient(case):
    model = case.backbone.model.train()
    loss, _, expected = packed_gradients(case)
    calls = []
    layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")).self_attn
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    again, _, found = packed_gradients(case)
    handle.remove()
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_logits_that_are_changed_behind_the_head_are_refused(case):
    def capped(**inputs):
        out = case.backbone.model(**inputs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    engine = TorchEngine(case.backbone, model=capped)
    with pytest.raises(ValueError, match=r"changes its logits behind the language-model head"):
        engine.score(case.prompts, case.completions)


def test_what_a_block_mask_cannot_say_is_refused(case):
    packed = pack(case.prompts, case.completions, 0)
    config = copy.deepcopy(case.backbone.model.config.get_text_config())
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="has linear_attention, which no block mask can express"):
        attention_masks(packed, config, torch.float32)
    with pytest.raises(ValueError, match="'flash_attention_2' does not take; load the model"):
        attention_masks(packed, SimpleNamespace(_attn_implementation="flash_attention_2"), torch.float32)
    with pytest.raises(ValueError, match="a completion without tokens"):
        pack(case.prompts[:1], [[torch.zeros(0, dtype=torch.long)]], 0)
