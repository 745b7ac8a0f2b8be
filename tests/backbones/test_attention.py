"""Observed attention against the library's own weights (`output_attentions` of its eager implementation)."""

import copy
import sys

import pytest
import torch
from tests.backbones.families import FAMILIES_BY_NAME
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitos.backbones.attention import observe_attention, observe_input
from vitos.core.prompt import pad_prompts


def inputs_of(backbone, picture):
    visuals = backbone.encode([picture(90, 131)])
    prompt = backbone.build_prompt("<image>Where?\nA. left\nB. right", visuals)
    return prompt, backbone.model_inputs(pad_prompts([prompt], backbone.pad_token_id))


@pytest.mark.parametrize("name", ["qwen2_5_vl, nano", "llava, LLaVA-Med", "gemma3", "internvl"])
@pytest.mark.parametrize("query", [-1, None, [3, 5, -2]])
def test_language_model_weights_are_the_library_s(name, query, picture):
    backbone = FAMILIES_BY_NAME[name].backbone()
    prompt, inputs = inputs_of(backbone, picture)
    decoder = backbone.model.model.get_decoder()
    before = decoder.config._attn_implementation
    found = observe_attention(
        decoder, decoder.layers[1].self_attn, lambda: backbone.model(**inputs, use_cache=False), query
    )
    assert decoder.config._attn_implementation == before
    assert "vitos_observed" not in ALL_ATTENTION_FUNCTIONS

    eager = copy.deepcopy(backbone.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        (weights,) = eager(**inputs, use_cache=False, output_attentions=True).attentions[1].float()
    expected = weights.mean(0)[query] if query is not None else weights.mean(0)
    expected = expected if query == -1 else expected.mean(0)
    torch.testing.assert_close(found.received, expected, atol=1e-6, rtol=1e-5)
    assert found.received.shape == (len(prompt),)


def library_attention(backbone, image, before=0):
    """Weights (heads, T, T) of the layer in question in the eager encoder; of several layers, the deepest.

    `before` goes back by a number of layers.
    """
    tower = copy.deepcopy(backbone.model.model.vision_tower)
    tower.config._attn_implementation = "eager"
    last = list(getattr(tower.encoder, "layers", None) or tower.encoder.layer)  # CLIP's name or DINOv2's
    wanted = backbone.model.config.vision_feature_layer
    used = (wanted[-1] if isinstance(wanted, list) else wanted) % (len(last) + 1)  # hidden states: 0 is the embeddings
    layer = last[used - 1 - before]
    layer = getattr(layer, "self_attn", None) or layer.attention
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out[1][0]))
    with torch.no_grad():
        tower(backbone.image_processor(images=[image], return_tensors="pt")["pixel_values"].to(tower.dtype))
    return seen[0].float()


@pytest.mark.parametrize("name", [n for n in FAMILIES_BY_NAME if n.startswith("llava")])
def test_the_cls_token_looks_where_the_library_says(name, picture):
    backbone, image = FAMILIES_BY_NAME[name].backbone(), picture(90, 131)
    found = backbone.encoder_attention(image)
    torch.testing.assert_close(found.received, library_attention(backbone, image).mean(0)[0, 1:], atol=1e-6, rtol=1e-5)
    assert found.keys.shape[1] == backbone.encode([image])[0].grid.num_tokens


def test_depth_counts_the_layers_that_are_used(picture):
    """The towers of these families are short: half of the used layers, rounded up, is the layer before the last."""
    for name in (n for n in FAMILIES_BY_NAME if n.startswith("llava") and "SigLIP" not in n):
        backbone, image = FAMILIES_BY_NAME[name].backbone(), picture(90, 131)
        layers, wanted = (
            backbone.model.config.vision_config.num_hidden_layers,
            backbone.model.config.vision_feature_layer,
        )
        used = (wanted[-1] if isinstance(wanted, list) else wanted) % (layers + 1)
        found = backbone.encoder_attention(image, depth=0.5)
        expected = library_attention(backbone, image, before=used - -(-used // 2)).mean(0)[0, 1:]
        torch.testing.assert_close(found.received, expected, atol=1e-6, rtol=1e-5)


def test_an_input_is_what_the_library_calls_a_hidden_state(picture):
    backbone = FAMILIES_BY_NAME["qwen2_5_vl, nano"].backbone()
    _, inputs = inputs_of(backbone, picture)
    layers = backbone.model.model.get_decoder().layers
    with torch.no_grad():
        expected = backbone.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(observe_input(layers[2], lambda: backbone.model(**inputs, use_cache=False)), expected)
    assert not layers[2]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="was not reached"):
        observe_input(layers[2], lambda: None)


def test_patch_embeddings_have_no_attention(picture, monkeypatch):
    backbone = FAMILIES_BY_NAME["llava, LLaVA-1.5"].backbone()
    monkeypatch.setattr(backbone.model.config, "vision_feature_layer", [0])
    with pytest.raises(ValueError, match=r"vision_feature_layer \[0\] is no layer with attention"):
        backbone.encoder_attention(picture(90, 131))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl, merge 3", "qwen3_vl"])
def test_qwen_s_tokens_are_in_the_order_of_the_grid(name, picture, monkeypatch):
    """Without rotation, a token's key is the mean of its patches' projections; the merger's input has the patches."""
    backbone, image = FAMILIES_BY_NAME[name].backbone(), picture(250, 190)
    vision, visual = backbone.model.config.vision_config, backbone.model.model.visual
    rotary = sys.modules[type(visual).__module__]
    monkeypatch.setattr(rotary, "apply_rotary_pos_emb_vision", lambda q, k, cos, sin: (q, k))
    indexes = getattr(vision, "fullatt_block_indexes", None)
    block, captured = visual.blocks[max(indexes) if indexes else -1], {}
    hooks = [
        block.attn.qkv.register_forward_hook(lambda module, args, out: captured.update(qkv=out)),
        visual.merger.register_forward_pre_hook(lambda module, args: captured.update(patches=args[0])),
    ]
    with torch.no_grad():
        (tokens,) = backbone.encode([image])
        merged = visual.merger(captured["patches"])
    for hook in hooks:
        hook.remove()
    place = torch.cdist(tokens.embeddings.double(), merged.double()).argmin(1)
    assert sorted(place.tolist()) == list(range(len(place)))
    heads, size = vision.num_heads, vision.spatial_merge_size**2
    q, k = captured["qkv"].view(len(captured["qkv"]), 3, heads, -1).float().permute(1, 2, 0, 3)[:2]
    received = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)).view(-1, size).sum(1)
    found = backbone.encoder_attention(image)
    torch.testing.assert_close(found.received, received[place], atol=1e-6, rtol=1e-5)
    keys = torch.stack([head.view(-1, size, head.shape[1]).mean(1)[place] for head in k])
    torch.testing.assert_close(found.keys, keys, atol=1e-5, rtol=1e-5)
    wide_q, wide_k = (part.transpose(0, 1).flatten(1) for part in (q, k))
    joint = (wide_q @ wide_k.T / wide_q.shape[1] ** 0.5).softmax(-1).mean(0).view(-1, size).sum(1)
    torch.testing.assert_close(found.joint, joint[place], atol=1e-6, rtol=1e-5)
    assert len(found.received) == tokens.grid.num_tokens


def test_a_family_without_encoder_attention_refuses(picture):
    backbone = FAMILIES_BY_NAME["gemma3"].backbone()
    with pytest.raises(ValueError, match="Gemma3 does not say"):
        backbone.encoder_attention(picture(90, 131))
