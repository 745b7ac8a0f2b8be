"""Every form of the loss in several optimiser steps per update: two processes (gloo), DDP and FSDP2, are one.

With an entropy term, truncated completions left out, and micro-batches of unlike number in the processes.
"""

import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.processes import WAYS, launch
from tests.rl.test_distributed import WORKER, job

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics
from vitos.rl.objectives import LOSSES

MINIBATCHES = {
    "schedule": "joint",
    "localization_steps": 1,
    "reasoning_steps": 1,
    "minibatches": 2,
    "entropy_beta": 0.01,
    "mask_truncated": True,
    "max_localization_tokens": 40,  # most are written to their end
    "oversampling_rounds": 0,
    "save_steps": 100,
    "log_gradient_cosine_steps": 0,
    "gradient_checkpointing": False,
}
# The form of the loss matters before gradients are added up, so two forms are enough for the second way.
CASES = [("ddp", loss) for loss in LOSSES] + [("fsdp", loss) for loss in ("token_mean", "gspo")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("losses")
    write_phantoms(base / "data", "train", 8)
    run_here = runpy.run_path(str(WORKER))["run"]
    for loss in LOSSES:
        run_here(job(base, base / f"one-{loss}", loss=loss, **MINIBATCHES))
    jobs = [job(base, base / f"{way}-{loss}", loss=loss, **MINIBATCHES | WAYS[way]) for way, loss in CASES]
    launch(WORKER, jobs, base)
    return base


@pytest.mark.slow
@pytest.mark.parametrize(("way", "loss"), CASES)
def test_two_processes_are_one(loss, way, runs):
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    expected, found = (load_file(runs / f"{name}-{loss}" / "model" / "model.safetensors") for name in ("one", way))
    assert found.keys() == expected.keys()
    moved = sum((expected[n] - start[n]).square().sum() for n in expected).sqrt()
    apart = sum((expected[n] - found[n]).square().sum() for n in expected).sqrt()
    assert float(moved) > 0.02
    assert float(apart / moved) < 1e-3
    rows, wanted = (read_metrics(runs / f"{name}-{loss}" / "metrics.jsonl") for name in (way, "one"))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [1, 2]
    assert any(abs(row["drift_kl/localization"]) > 1e-7 for row in wanted)  # the second step is off policy
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            if not key.startswith(("seconds/", "memory/")) and key != "total_flos" and value is not None:
                assert row[key] == pytest.approx(value, rel=5e-3, abs=1e-4), (row["step"], key)


@pytest.mark.slow
def test_the_forms_are_not_one_another(runs):
    """Otherwise an option that gets lost on its way would not be seen."""
    found = [load_file(runs / f"one-{loss}" / "model" / "model.safetensors") for loss in LOSSES]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert any(not (one[name] == other[name]).all() for name in one)
