"""The benchmark at true shapes, on shapes that are not true: what it counts, writes and takes up again."""

import json

import pytest
import torch
from benchmarks import true_shapes
from benchmarks.peak import peak_memory
from benchmarks.true_shapes import ShapesSettings, ideal_ratio, make_backbone, make_prompt, run_shapes, sparsified
from torch.utils.flop_counter import FlopCounterMode

from vitos.core.geometry import Box
from vitos.doctor.shapes import KNOWN

PLAN = ShapesSettings(pixels=(112, 140), keeps=(0.5, 0.25), layers=2, rounds=1, text_tokens=40)


def small(name):
    """A known configuration with narrow layers."""
    config = json.loads(json.dumps(KNOWN[name]))
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if config["model_type"] == "qwen2_5_vl":
        config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
        config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    else:
        config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return config


@pytest.fixture(scope="module")
def models():
    return {"qwen": small("Qwen2.5-VL-7B-Instruct"), "llava": small("HuatuoGPT-Vision-7B-hf")}


def test_results_are_written_and_taken_up_again(models, tmp_path, monkeypatch):
    results = run_shapes(tmp_path, PLAN, models)
    cases = results["cases"]
    assert [(c["model"], c["pixels"], c["keep"]) for c in cases] == [
        *[("qwen", px, keep) for px in (112, 140) for keep in (1.0, 0.5, 0.25)],
        *[("llava", 336, keep) for keep in (1.0, 0.5, 0.25)],
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for case in cases:
        # Two layers of two KV heads of 16 numbers, keys and values, in float32.
        assert case["kv_bytes"] == case["prompt_tokens"] * 2 * 2 * 2 * 16 * 4
        assert case["layers_of"] == 6
        if case["keep"] == 1.0:
            assert (case["prefill_ratio"], case["ideal_ratio"], case["peak_ratio"]) == (1, 1, 1)
        else:
            assert case["kept_share"] == pytest.approx(case["keep"], abs=0.2)
            assert case["kv_ratio"] < 1
            assert case["peak_ratio"] < 1
            assert case["sparsify_seconds"] > 0
    assert "| llava (6) | 336 px | 576 | 100% |" in (tmp_path / "table.md").read_text()

    # A killed run: the last size is missing. Only that is measured, and nothing else changes.
    (tmp_path / "results.json").write_text(json.dumps(results | {"cases": cases[:6]}))
    made = []
    monkeypatch.setattr(true_shapes, "make_backbone", lambda c, *a: made.append(c) or make_backbone(c, *a))
    again = run_shapes(tmp_path, PLAN, models)
    assert again["cases"][:6] == cases[:6]
    assert len(again["cases"]) == 9
    assert made == [models["llava"]]
    with pytest.raises(ValueError, match="name another folder"):
        run_shapes(tmp_path, ShapesSettings(rounds=7), models)


def test_the_ideal_is_the_ratio_of_counted_operations(models):
    """Against PyTorch's own counter on eager attention, whose products over hidden pairs are taken off by hand."""
    backbone, shape = make_backbone(models["qwen"], ShapesSettings(layers=6), "cpu")
    backbone.model.set_attn_implementation("eager")
    visual = true_shapes._visual_tokens(backbone, 224)
    dense = make_prompt(backbone, visual, 40)
    sparse, selection = sparsified(dense, visual.grid, Box(0, 0, 0.5, 0.5))
    assert selection.mask.sum() == 16 == int(sparse.is_visual.sum())
    counted = []
    for prompt in (sparse, dense):
        with FlopCounterMode(display=False) as counter:
            true_shapes._prefill(backbone, prompt)
        tokens, head = len(prompt), 2 * 64 * true_shapes.VOCABULARY
        hidden_pairs = tokens**2 - tokens * (tokens + 1) / 2
        counted.append(counter.get_total_flops() - head - 6 * 4 * 64 * hidden_pairs)
    assert ideal_ratio(shape, len(sparse), len(dense)) == pytest.approx(counted[0] / counted[1], rel=2e-3)


def test_peak_memory_counts_what_was_there_at_once():
    with peak_memory() as peak:
        first = torch.zeros(1000, 1000)
        second = torch.zeros(2000, 1000)
        del first
        third = torch.zeros(500, 1000)
    assert peak[0] == pytest.approx(12_000_000, rel=0.01)
    assert second.nbytes + third.nbytes == 10_000_000
