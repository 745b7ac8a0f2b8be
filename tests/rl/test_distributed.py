"""One process against two, with DDP and with FSDP2, on the CPU (gloo): rewards, figures, weights, checkpoints."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import WAYS, launch

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics

WORKER = Path(__file__).with_name("worker.py")
# Two updates of each stage; checkpoints just before the change of stage and at the end.
OPTIONS = {
    "localization_steps": 2,
    "reasoning_steps": 2,
    "questions_per_step": 4,
    "num_localizations": 2,
    "num_reasonings": 2,
    "max_localization_tokens": 24,
    "max_reasoning_tokens": 14,
    "temperature": 1.4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,  # so that rounding is not blown up where a gradient is nearly 0
    "lr_scheduler_type": "linear",
    "seed": 3,
    "save_steps": 2,
    "save_total_limit": None,
    "log_samples_steps": 1,
    "oversampling_rounds": 2,
    "log_samples": 8,
    "micro_batch_tokens": 300,  # one or two prompts: the processes have different numbers of micro-batches
    "gradient_checkpointing": True,
    "log_gradient_cosine_steps": 2,
    "disable_tqdm": True,
    "use_cpu": True,
}


here = runpy.run_path(str(WORKER))
run_here, half = here["run"], here["half"]


def job(base, run, resume=None, **options):
    return {
        "data": str(base / "data" / "train.json"),
        "run": str(run),
        "resume": resume,
        "options": OPTIONS | options,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole runs and continued ones, by name."""
    base = tmp_path_factory.mktemp("parallel")
    write_phantoms(base / "data", "train", 8)
    run_here(job(base, base / "one"))
    jobs = []
    for name, options in WAYS.items():
        continued = half(base / "one", base / f"one-then-{name}")
        jobs += [job(base, base / name, **options), job(base, continued, True, **options)]
    launch(WORKER, jobs, base)
    for name in WAYS:
        run_here(job(base, half(base / name, base / f"{name}-then-one"), True))
    return base


NAMES = ["ddp", "fsdp", "one-then-ddp", "one-then-fsdp", "ddp-then-one", "fsdp-then-one"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_one_process(name, runs):
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    for folder in ("model", "checkpoint-4", "stage1"):
        expected, found = (load_file(runs / run / folder / "model.safetensors") for run in ("one", name))
        assert found.keys() == expected.keys()
        moved = sum((expected[n] - start[n]).square().sum() for n in expected).sqrt()
        apart = sum((expected[n] - found[n]).square().sum() for n in expected).sqrt()
        assert float(moved) > 0.05
        assert float(apart / moved) < 1e-3
        assert all(torch.equal(found[n], start[n]) for n in found if "visual." in n)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_and_figures_are_those_of_one_process(name, runs):
    rows, expected = (read_metrics(runs / run / "metrics.jsonl") for run in (name, "one"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4]
    assert any(row.get(f"skipped_groups/{b}", 0) > 0 for row in expected for b in ("localization", "reasoning"))
    assert any(row["oversampled_questions"] > 0 for row in expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            if not key.startswith(("seconds/", "memory/")) and key != "total_flos" and value is not None:
                assert row[key] == pytest.approx(value, rel=5e-3, abs=1e-4), (row["step"], key)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_samples_are_written_once_and_alike(name, runs):
    """All questions of an update, with the texts and rewards of every process, in the order of one."""
    for step in (1, 2):
        rows, expected = (
            json.loads((runs / run / "samples" / f"step-{step}.json").read_text()) for run in (name, "one")
        )
        assert 4 <= len(rows) <= 8
        assert rows == expected


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_optimizer_states_are_those_of_one_process(name, runs):
    expected, found = (
        torch.load(runs / run / "checkpoint-2" / "optimizer.pt", weights_only=True) for run in ("one", name)
    )
    assert found["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        for key, value in values.items():
            other = found["state"][index][key]
            assert other.shape == value.shape
            assert float((other - value).norm()) <= 1e-3 * float(value.norm()) + 1e-7
