"""Estimates of memory and work against what PyTorch itself reports, and what the doctor makes of them."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.backbones.families import FAMILIES
from transformers import Qwen2_5_VLConfig
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.config.recipe import load_recipe
from vitos.doctor import estimate
from vitos.doctor.advice import remedies
from vitos.doctor.devices import DEVICES, find_device
from vitos.doctor.estimate import Workload, batches, cache_room, memory
from vitos.doctor.recipe import diagnose_recipe
from vitos.doctor.shapes import find_config, model_shape
from vitos.doctor.speed import forward_flops
from vitos.engines import chunked_logprobs, kv_cache
from vitos.engines.group_decode import Siblings
from vitos.engines.kv_cache import GrowingLayer
from vitos.engines.torch_engine import TorchEngine, chunk_by_tokens
from vitos.scans.store import ScanStore

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def measured():
    """Lines of `measured_peak.py`, by name."""
    command = [sys.executable, "-m", "tests.measured_peak"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", ["full", "checkpointing", "adapters", "large vocabulary", "many siblings"])
def test_estimated_memory_is_within_15_percent_of_the_measured_peak(measured, name):
    row = measured[name]
    shape = model_shape(Qwen2_5_VLConfig(**row["config"]), max_pixels=256**2)
    found = memory(shape, Workload(weight_bytes=4, precision="float32", scans=1, **row["job"]))
    assert shape.visual_tokens == 256
    assert found.peak == pytest.approx(row["peak"], rel=0.15), found


def test_products_of_a_forward_pass_are_those_that_pytorch_counts(measured):
    shape = model_shape(Qwen2_5_VLConfig(**measured["full"]["config"]), max_pixels=256**2)
    tokens = measured["flops"]["prompt"] + 3 * 20
    assert forward_flops(shape, 2, tokens, 2 * 3 * 20) == pytest.approx(measured["flops"]["flops"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the hub shows them for the published checkpoints
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("lingshu-medical-mllm/Lingshu-7B", 8_292_166_656),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(name, parameters):
    shape = model_shape(find_config(name), max_pixels=1_003_520)
    assert shape.text_parameters + shape.vision_parameters == parameters
    assert shape.visual_tokens == 1280


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "siblings", "longest"), [(7, 1, 40), (300, 8, 64), (5, 3, 1)])
def test_room_in_the_cache_is_what_growing_layers_make(prompt, siblings, longest):
    layer = GrowingLayer()
    layer.update(*torch.zeros(2, 1, 1, prompt, 1))
    for _ in range(longest - 1):
        layer.update(*torch.zeros(2, 1, 1, siblings, 1))
    held = layer.keys.untyped_storage().nbytes() // layer.keys.element_size()
    assert cache_room(prompt, siblings, longest) == held


def test_a_model_that_is_not_here_says_what_is_needed():
    with pytest.raises(ValueError, match=r"download its config\.json"):
        find_config("nobody/unheard-of-model")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_estimated(path):
    found = diagnose_recipe(load_recipe(path), device=DEVICES["H200 141GB"])
    assert found.memory.peak > found.memory.sampling["weights"] > 0
    assert all(value > 0 for stage in found.stages for value in stage.seconds.values())
    assert sum(stage.steps for stage in found.stages) == found.recipe.train.total_steps
    if found.shape.text_parameters > 1e9:  # on nano, adapters are larger than what they adapt
        assert all(memory(found.shape, work).peak <= found.memory.peak for _, work in remedies(found.work))


def test_siblings_share_no_prompt_under_another_attention():
    def estimated(attention):
        changes = [f"model.attn_implementation={attention}", "train.sampler=torch", "train.sampler_options={}"]
        return diagnose_recipe(load_recipe("lingshu-7b", changes)).memory

    assert estimated("eager").sampling["KV cache"] > estimated("sdpa").sampling["KV cache"]
    assert estimated("eager").update == estimated("sdpa").update


def test_what_does_not_fit_is_said_with_what_helps():
    recipe = load_recipe(ROOT / "recipes/lingshu-7b.yaml", ["trainer={}", "train.questions_per_step=8"])
    found = diagnose_recipe(recipe, devices=1, device=find_device("H200 141GB"))
    (check,) = [check for check in found.checks if check.name == "memory"]
    assert check.status == "missing"
    assert "model.lora" in check.remedy
    assert "fits" in check.remedy
    recipes = [check.detail for check in found.checks if check.name == "recipe"]
    assert any(detail.startswith("lingshu-7b-lora-1gpu fits") for detail in recipes)


def test_the_command_line_prints_parts_and_assumptions():
    recipe = str(ROOT / "recipes/lingshu-7b-lora-48gb.yaml")
    result = CliRunner().invoke(app, ["doctor", "--recipe", recipe, "--device", "80GB 989TFLOPS 3.35TB/s"])
    for word in ("KV cache", "optimizer", "activations", "Seconds of an update", "Assumed", "embedding cache"):
        assert word in result.output
    assert result.exit_code in (0, 1)


def workload(**changes):
    """A small workload."""
    given = {
        "localize_tokens": 300,
        "reason_tokens": 200,
        "visual_tokens": 256,
        "max_localization_tokens": 40,
        "max_reasoning_tokens": 30,
        "questions": 6,
        "num_localizations": 2,
        "num_reasonings": 3,
        "micro_batch_tokens": 2000,
        "weight_bytes": 4,
        "precision": "float32",
    }
    return Workload(**given | changes)


def test_batches_are_those_of_the_engine():
    for name, prompts, prompt, siblings, longest in (("localization", 6, 300, 2, 40), ("reasoning", 12, 200, 3, 30)):
        chunks = list(chunk_by_tokens([(1, prompt + siblings * longest)] * prompts, 2000))
        batch, count = batches(workload())[name]
        assert (batch.rows, count) == (len(chunks[0]), len(chunks))


def test_sharding_divides_what_it_shards_and_nothing_else():
    shape = model_shape(find_config("Lingshu-7B"), max_pixels=1_003_520)
    work = workload(precision="bfloat16", checkpointing=True, sharded=True)
    one, eight = (memory(shape, dataclasses.replace(work, devices=n)) for n in (1, 8))
    assert eight.update["gradients"] * 8 == one.update["gradients"]
    assert eight.update["activations"] == one.update["activations"]
    assert eight.sampling["KV cache"] == one.sampling["KV cache"]


def default(function, name):
    return inspect.signature(function).parameters[name].default


def test_constants_are_those_of_the_engine_and_the_scan_store():
    """The estimate must not import torch, so it has copies."""
    assert estimate.HEAD_TOKENS == chunked_logprobs.HEAD_TOKENS == default(TorchEngine, "head_tokens")
    assert (estimate.CACHE_ROOM, estimate.CACHE_SHARE) == (kv_cache.ROOM, kv_cache.SHARE)
    assert default(ScanStore, "max_bytes") == estimate.SCAN_BYTES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_prompt_is_shared_where_the_engine_shares_it(family):
    backbone = family.backbone()
    assert model_shape(backbone.model.config).shares_prompt == Siblings.can(backbone, [2])


def test_importing_the_estimate_imports_no_torch():
    code = (
        "import sys, vitos.doctor.estimate, vitos.doctor.devices; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
