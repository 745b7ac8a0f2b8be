"""The weights that are pushed and saved: those of PEFT's own merge, made without touching the model."""

import copy

import pytest
import torch

from vitos.engines.weights import effective_weights

peft = pytest.importorskip("peft")

PLACES = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"v_proj": 3, "down_proj": 64},
    },
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["norm"]},
    "biases": {"bias": "all"},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "half precision": {"autocast": False, "dtype": torch.bfloat16},
}


@pytest.fixture
def language(nano):
    """A copy of nano's model in float32."""
    return copy.deepcopy(nano.model).float()


def adapted(model, config, seed=0, autocast=True):
    """The model with adapters of random weights (PEFT's are 0 at the start)."""
    network = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.requires_grad and "visual" not in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw).to(weight.dtype))
    return network


def config(**options):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": places()} | options))


def places():
    return r".*language_model.*(" + "|".join(PLACES) + ")"


@pytest.mark.parametrize("kind", list(KINDS))
def test_equals_pefts_own_merge_and_leaves_the_model_alone(kind, language):
    options = dict(KINDS[kind])
    autocast, dtype = options.pop("autocast", True), options.pop("dtype", torch.float32)
    network = adapted(language.to(dtype), config(**options), autocast=autocast)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = {name: make() for name, make in effective_weights(network.get_base_model()).items()}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    expected = dict(network.merge_and_unload(safe_merge=True).named_parameters())
    assert found.keys() == expected.keys()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.detach().float(), **tolerance)


def test_an_embedding_and_an_untied_head(language):
    language.config.tie_word_embeddings = language.config.text_config.tie_word_embeddings = False
    head = torch.nn.Linear(*reversed(language.get_input_embeddings().weight.shape), bias=False)
    with torch.no_grad():
        head.weight.copy_(language.get_input_embeddings().weight)
    language.set_output_embeddings(head)
    network = adapted(language, config(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]))
    found = {name: make() for name, make in effective_weights(network.get_base_model()).items()}
    expected = dict(network.merge_and_unload(safe_merge=True).named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), atol=1e-6, rtol=1e-5)


def test_logits_of_the_weights_are_those_of_the_adapted_model(nano, language):
    """Without PEFT's merge: the weights in a plain model, against the adapted one's forward pass."""
    network = adapted(language, config(use_dora=True, use_rslora=True, modules_to_save=["norm"]))
    plain = copy.deepcopy(nano.model).float()
    outcome = plain.load_state_dict(
        {name: make() for name, make in effective_weights(network.get_base_model()).items()}, strict=False
    )
    assert not outcome.unexpected_keys
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        start = copy.deepcopy(nano.model).float()(input_ids=ids).logits
        expected, found = network.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    assert (expected - start).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


REFUSED = {
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "TrainableTokensWrapper"),
    "parameters": (
        {"target_modules": [], "target_parameters": ["layers.0.self_attn.q_proj.weight"]},
        "ParamWrapper",
    ),
    "tied": ({"target_modules": ["embed_tokens"]}, "tied"),
    "tied copy": ({"modules_to_save": ["embed_tokens"]}, "tied"),
    "conv": ({"target_modules": [r"patch_embed.proj"]}, "Conv3d"),
    "alora": ({"alora_invocation_tokens": [1]}, "ALora"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_not_be_right_is_refused_by_name(name, language):
    options, reason = REFUSED[name]
    chosen = config(**options) if name != "alora" else config(**options, task_type="CAUSAL_LM")
    network = peft.get_peft_model(language, chosen)
    with pytest.raises(ValueError, match=rf"the adapter of .* cannot be added.*{reason}"):
        effective_weights(network.get_base_model())


def test_other_methods_than_lora_are_refused(language):
    network = peft.get_peft_model(language, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="only LoRA and DoRA"):
        effective_weights(network.get_base_model())


def test_two_adapters_at_once_and_a_merged_one_are_refused(language):
    network = adapted(language, config())
    network.add_adapter("other", config())
    network.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 active adapters"):
        effective_weights(network.get_base_model())
    network.base_model.set_adapter("default")
    network.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        effective_weights(network.get_base_model())


@pytest.mark.parametrize("lora", [False, True])
def test_names_are_the_model_s_own_behind_activation_checkpointing_by_accelerate(lora, language):
    """FSDP2's `activation_checkpointing` wraps each layer, which gives its parameters longer names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = dict(language.named_parameters())
    if lora:
        adapted(language, config())
    layers = [name for name, module in language.named_modules() if type(module).__name__.endswith("DecoderLayer")]
    for name in layers:
        language.set_submodule(name, checkpoint_wrapper(language.get_submodule(name)))
    assert any("_checkpoint_wrapped_module" in name for name, _ in language.named_parameters())
    found = effective_weights(language)
    assert found.keys() == expected.keys()
    assert all(found[name]().shape == weight.shape for name, weight in expected.items())
