"""`python -m benchmarks infer`: its arithmetic by hand, and a run on the smallest image."""

import json

import numpy as np
import pytest
import torch
from benchmarks.__main__ import app
from benchmarks.inference import STAGES, Settings, compare, middle, run_benchmark
from benchmarks.inference_models import build_model
from benchmarks.inference_page import inference_page, write_inference
from typer.testing import CliRunner

from vitos.core.geometry import TokenGrid
from vitos.core.sparsify import select


@pytest.mark.parametrize(("side", "share"), [(36, 0.25), (18, 0.25), (8, 0.1), (37, 0.5), (4, 1.0), (3, 0.01)])
def test_the_evidence_is_a_square_of_whole_cells(side, share):
    mask = select(TokenGrid.single(side, side), [middle(side, share)]).mask.reshape(side, side)
    rows, cols = mask.any(1).sum(), mask.any(0).sum()
    assert rows == cols == max(1, round(side * share**0.5))
    assert mask.sum() == rows * cols


def test_ratios_are_taken_within_a_run():
    ours = [{"looks": 2.0, "total": 6.0, "kv_bytes": 25}, {"looks": 9.0, "total": 9.0, "kv_bytes": 25}]
    dense = [{"looks": 4.0, "total": 6.0, "kv_bytes": 100}, {"looks": 10.0, "total": 18.0, "kv_bytes": 100}]
    for run, language in zip((*ours, *dense), (1.0, 3.0, 2.0, 3.0), strict=True):
        run["language"] = language
    found = compare(ours, dense)
    np.testing.assert_allclose(found["looks_ratio"], [0.7, 0.5, 0.9])
    np.testing.assert_allclose(found["total_ratio"], [0.75, 0.5, 1.0])
    np.testing.assert_allclose(found["language_ratio"], [0.75, 0.5, 1.0])
    assert found["kv_ratio"] == 0.25


@pytest.fixture(scope="module")
def results():
    settings = Settings(sizes=(128,), batches=(1, 2), runs=1, evidence_tokens=3, reasoning_tokens=4)
    return run_benchmark(settings) | {"command": "python -m benchmarks infer"}


def test_tokens_of_every_plan_and_stage(results):
    for case in results["cases"]:
        batch, rows = case["batch"], {plan: case[plan]["tokens"] for plan in results["plans"]}
        text = rows["dense"]["prefill 2"] // batch - 64
        assert case["tokens"] == 64
        assert {plan: row["vision"] // batch for plan, row in rows.items()} == {
            "dense": 64, "two_pass": 64, "gather": 64, "coarse": 16 + 16, "crop": 64 + 16, "one_pass": 64,
            "glance": 16 + 16,
        }  # fmt: skip
        for plan, row in rows.items():
            assert row["decode 2"] == 4 * batch
            assert row["decode 1"] == (0 if plan in ("dense", "one_pass", "glance") else 3 * batch)
            assert not case[plan]["fallback"]
        assert rows["two_pass"]["prefill 2"] == (text + 16) * batch
        assert rows["coarse"]["prefill 2"] == (text + 16) * batch
        assert rows["gather"]["prefill 2"] < text * batch
        assert rows["gather"]["prefill 1"] == rows["two_pass"]["prefill 1"]
        assert rows["coarse"]["prefill 1"] == rows["two_pass"]["prefill 1"] - 48 * batch
        assert rows["one_pass"]["prefill 1"] == rows["dense"]["prefill 2"]  # through one of four layers
        assert rows["one_pass"]["prefill 2"] == (text + 16) * batch  # through the other three
        assert rows["glance"]["prefill 1"] == rows["dense"]["prefill 2"] - 48 * batch  # a quarter of the tokens
        assert rows["glance"]["prefill 2"] == (text + 16) * batch
        kv = {plan: case[plan]["kv_bytes"] for plan in results["plans"]}
        assert kv["glance"] == kv["one_pass"] == kv["gather"] == kv["coarse"] == kv["two_pass"] < kv["dense"]
        # 4 layers x keys and values x 2 heads of 32 x 4 bytes; the last token is never run.
        assert kv["dense"] == batch * (64 + text + 3) * 4 * 2 * 2 * 32 * 4
        # What a plan holds at least: the cache it ends with, beside the prefix that gather took it from.
        assert all(case[p]["peak_bytes"] > kv[p] + case[p]["prefix_bytes"] for p in results["plans"])
        assert case["gather"]["prefix_bytes"] > case["dense"]["prefix_bytes"] == 0


def test_page_and_figure(results, tmp_path):
    write_inference(tmp_path, results)
    assert json.loads((tmp_path / "inference.json").read_text()) == json.loads(json.dumps(results))
    page = inference_page(results)
    assert page.count("\n## 128 px (64 visual tokens), 25% kept, batch") == 2
    assert all(f"{stage} s" in page for stage in STAGES)
    assert page.count("| gather |") == 2
    assert (tmp_path / "inference.png").stat().st_size > 10_000


def test_the_verb(tmp_path):
    options = ["--plan", "gather", "--size", "64", "--kept", "0.5", "--runs", "1"]
    result = CliRunner().invoke(app, ["infer", "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "inference.json").read_text())
    assert found["plans"] == ["dense", "gather"]
    assert [case["tokens"] for case in found["cases"]] == [16]
    assert (tmp_path / "inference.md").is_file()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no such plan: 'fast'"):
        Settings(plans=("fast",))
    with pytest.raises(ValueError, match=r"kept shares must lie in \(0, 1\]"):
        Settings(kept=(0.0,))
    with pytest.raises(ValueError, match=r"model must be one of nano, Qwen2\.5-VL-3B-Instruct"):
        build_model("gpt", 4, torch.float32, torch.device("cpu"))


def test_true_shapes_are_those_of_the_published_model():
    """Built without memory; parameters of Qwen2.5-VL-3B: 3,754,622,976."""
    with torch.device("meta"):
        backbone, said = build_model("Qwen2.5-VL-3B-Instruct", 1, torch.bfloat16, torch.device("meta"))
    assert "36 of 36 layers, 32 of 32 vision blocks" in said
    assert sum(p.numel() for p in backbone.model.parameters()) == 3_754_622_976
    with torch.device("meta"):
        backbone, said = build_model("Qwen2.5-VL-3B-Instruct", 4, torch.float32, torch.device("meta"))
    assert "9 of 36 layers, 8 of 32 vision blocks, 1/4 of the vocabulary" in said
    assert len(backbone.model.model.language_model.layers) == 9
    assert backbone.model.config.vision_config.fullatt_block_indexes == [7]
