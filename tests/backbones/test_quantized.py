"""Frozen weights in 4 bits: what is quantized, what is refused, and that what is written is what was trained.

The numbers of the 4 bits are compared with bitsandbytes' own; without it only the refusals are tested.
"""

import importlib.util
import json
import zlib

import pytest
import torch
from safetensors.torch import load_file
from transformers.quantizers.base import HfQuantizer

from vitos.backbones import quantized
from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import add_adapters, merged_weights, save_adapted
from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import ExtraReward
from vitos.rl.trainer import DualStreamTrainer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra `quant`)"
)


@pytest.fixture
def nf4(monkeypatch):
    # On a CPU with AVX512-BF16, bitsandbytes repacks weights in evaluation mode, which its backward pass cannot read.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return SparseVLM.from_pretrained("nano", device="cpu", dtype=torch.bfloat16, quantization="nf4")


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'vitos\[quant\]'"):
        SparseVLM.from_pretrained("nano", device="cpu", quantization="nf4")


@needs_bitsandbytes
def test_only_linear_layers_of_the_language_model_are_quantized(nf4):
    model = nf4.backbone.model
    assert quantized.is_quantized(model)
    packed = {name for name, weight in model.named_parameters() if quantized.is_packed(weight)}
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model.layers." in name
    }
    assert packed == expected
    assert all(weight.dtype == torch.bfloat16 for name, weight in model.named_parameters() if name not in packed)


@needs_bitsandbytes
def test_all_weights_cannot_be_trained(nf4, phantom_records, tmp_path):
    config = DualStreamConfig(output_dir=str(tmp_path), questions_per_step=2, use_cpu=True)
    with pytest.raises(ValueError, match=r"weights in 4 bits cannot be trained; add model\.lora"):
        DualStreamTrainer(nf4, config, phantom_records)


@needs_bitsandbytes
def test_what_is_written_is_what_was_trained(nf4, phantom_records, tmp_path):
    """One update with adapters; the written float32 checkpoint has the logits of the 4-bit model with its adapters."""
    from peft import LoraConfig

    config = DualStreamConfig(
        output_dir=str(tmp_path / "run"),
        schedule="localization-only",
        localization_steps=1,
        questions_per_step=2,
        num_localizations=2,
        num_reasonings=1,
        max_localization_tokens=24,
        temperature=1.4,
        max_reasoning_tokens=4,
        skip_equal_outcomes=False,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        log_samples_steps=0,
    )
    adapters = LoraConfig(r=4, target_modules="all-linear")
    telling = ExtraReward(
        "telling", lambda response, record: zlib.crc32(response.text.encode()) % 97 / 97, weight=1.0, branch="both"
    )
    trainer = DualStreamTrainer(nf4, config, phantom_records, lora=adapters, reward_funcs=[telling])
    trainer.train()
    moved = [float(p.detach().abs().max()) for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert max(moved) > 0
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in settings
    written = SparseVLM.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert written.backbone.model.dtype == torch.float32
    assert not quantized.is_quantized(written.backbone.model)
    same_logits(trainer.model, written.backbone)


def same_logits(network, backbone):
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        ours = network(input_ids=ids).logits.float()
        plain = backbone.model(input_ids=ids).logits
        backbone.model.bfloat16()
        rounded = backbone.model(input_ids=ids).logits.float()
    # As near as the same weights are to themselves when they compute in bfloat16.
    assert float((ours - plain).abs().max()) < 3 * float((rounded - plain).abs().max()) + 1e-3
    assert float(plain.std()) > 0.1


@needs_bitsandbytes
def test_four_bits_are_read_as_bitsandbytes_reads_them(nf4, tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig

    layers = {n: m for n, m in nf4.backbone.model.named_modules() if n.endswith("layers.1.mlp.down_proj")}
    ((name, layer),) = layers.items()
    expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    network = add_adapters(nf4, LoraConfig(r=2, target_modules="all-linear"))
    weights = merged_weights(network)  # fresh adapters change nothing
    assert torch.equal(weights[f"{name}.weight"], expected)
    assert set(weights) >= {
        n for n, _ in SparseVLM.from_pretrained("nano", device="cpu").backbone.model.named_parameters()
    }
    save_adapted(nf4, weights, tmp_path)
    assert not any(word in key for key in weights for word in ("absmax", "quant_map", "quant_state"))


class Quantizer(HfQuantizer):
    """A quantizer of transformers that does nothing."""

    is_trainable = True

    def __init__(self):
        pass

    def is_serializable(self):
        return True


def test_the_model_s_quantizer_does_not_replace_the_weights_that_are_written(tmp_path):
    """`save_pretrained` asks a quantizer for the weights, whichever it was given; it would write adapters apart."""
    peft = pytest.importorskip("peft")
    policy = SparseVLM.from_pretrained("nano", device="cpu")
    network = add_adapters(policy, peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    policy.backbone.model.hf_quantizer = quantizer = Quantizer()
    weights = merged_weights(network)
    save_adapted(policy, weights, tmp_path)
    assert policy.backbone.model.hf_quantizer is quantizer
    assert not any("lora_" in name for name in load_file(tmp_path / "model.safetensors"))
    again = SparseVLM.from_pretrained(tmp_path, device="cpu").backbone.model
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
