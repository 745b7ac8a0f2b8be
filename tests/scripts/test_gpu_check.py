"""Each part of `scripts/gpu_check.py` at a tiny size on the CPU, its time boxes, and that a bare machine runs it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import gpu_check
from scripts.gpu import invariants
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.doctor.speed import Assumptions, measured_assumptions

ROOT = Path(__file__).parents[2]
BARE = """
import sys
from importlib.machinery import PathFinder
ABSENT = {"pydantic", "pydantic_core", "datasets", "vllm", "trl", "pydicom", "nibabel", "wandb", "bitsandbytes"}
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, n, p=None, t=None: None if n.split(".")[0] in ABSENT else real(n, p, t))
sys.path.insert(0, "scripts")
import gpu_check
gpu_check.BOXES = dict.fromkeys(gpu_check.BOXES, 1200)
code = gpu_check.main(["--device", "cpu", "--tiny", "--part", "invariants", "--out", sys.argv[1], "--minutes", "60"])
import importlib
for name in gpu_check.BOXES:
    importlib.import_module(f"scripts.gpu.{name}")
print("code", code)
"""


def run(tmp_path, *arguments):
    code = gpu_check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "results.json").read_text("utf-8"))


@pytest.fixture
def patient(monkeypatch):
    """Time boxes for a busy machine."""
    monkeypatch.setattr(gpu_check, "BOXES", dict.fromkeys(gpu_check.BOXES, 1200))


def test_invariants_of_a_family_hold_and_the_control_does_not(tmp_path, patient):
    code, results = run(tmp_path, "--part", "invariants", "--minutes", "60")
    part = results["parts"]["invariants"]
    assert code == 0
    assert part["finished"]
    assert [row["case"] for row in part["rows"]] == ["qwen2_5_vl, float32", "qwen2_5_vl, bfloat16"]
    for row in part["rows"]:
        assert row["ok"] is True
        assert set(row["errors"]) == {"keep all", "sparse = masked dense", "decoding = one forward"}
        assert row["control"] > 1


def test_a_wrong_position_fails_the_invariants(tmp_path, patient, monkeypatch):
    right = invariants.forward
    monkeypatch.setattr(invariants, "forward", lambda backbone, prompt: right(backbone, shifted(prompt)))
    code, results = run(tmp_path, "--part", "invariants", "--minutes", "60")
    assert code == 1
    assert not any(row["ok"] for row in results["parts"]["invariants"]["rows"])
    assert "FAILED" in (tmp_path / "table.md").read_text("utf-8")


def shifted(prompt):
    """The prompt with its last half one position further."""
    positions = prompt.position_ids.clone()
    positions[:, positions.shape[1] // 2 :] += 1
    return replace(prompt, position_ids=positions)


def test_updates_are_measured_and_near_the_estimate(tmp_path, patient):
    code, results = run(tmp_path, "--part", "updates", "--minutes", "60")
    rows = results["parts"]["updates"]["rows"]
    assert code == 0
    assert len(rows) == 2
    for row in rows:
        assert row["peak_bytes"] == pytest.approx(row["planned_peak_bytes"], rel=0.2)
        assert row["tokens_per_second"] > 0
        assert 0 < row["share_sampling"] < 1
        assert all(value > 0 for value in row["seconds"].values())


def test_plans_are_timed_against_dense(tmp_path, patient):
    code, results = run(tmp_path, "--part", "plans", "--minutes", "60")
    (row,) = results["parts"]["plans"]["rows"]
    assert code == 0
    assert row["plans"]["dense"]["total_ratio"] == [1, 1, 1]
    assert row["plans"]["two_pass"]["kept"] == pytest.approx(0.25, abs=0.05)
    assert set(row["plans"]["dense"]["seconds"]) >= {"vision", "prefill 1", "decode 1"}


def test_the_quickstart_runs_on_both_devices(tmp_path, patient):
    code, results = run(tmp_path, "--part", "quickstart", "--minutes", "60")
    answers, updates, whole = results["parts"]["quickstart"]["rows"]
    assert code == 0
    assert answers["answers"]["two_pass"]["same"] == 1  # here both devices are the CPU
    assert set(updates["largest_gaps"]) == {"reward/localization", "reward/reasoning", "iou", "loss/policy"}
    assert max(updates["largest_gaps"].values()) == 0
    assert len(updates["cpu"]) == 2
    assert 0 <= whole["accuracy"]["two_pass"] <= 1


def test_a_part_whose_time_is_over_leaves_its_rows_and_the_next_part_runs(tmp_path, monkeypatch):
    def endless(setting):
        yield {"case": "first", "ok": True, "summary": "done"}
        time.sleep(60)

    def quick(setting):
        yield {"case": "second", "ok": None, "summary": "done"}

    parts = {"scripts.gpu.plans": endless, "scripts.gpu.quickstart": quick}
    modules = {name: type("Part", (), {"rows": staticmethod(rows)}) for name, rows in parts.items()}
    monkeypatch.setattr(gpu_check, "BOXES", {"plans": 0.5, "quickstart": 30})
    monkeypatch.setattr(gpu_check.importlib, "import_module", lambda name: modules[name])
    started = time.perf_counter()
    code, results = run(tmp_path, "--part", "plans", "--part", "quickstart", "--minutes", "8")
    assert time.perf_counter() - started < 30
    assert code == 1
    assert [row["case"] for row in results["parts"]["plans"]["rows"]] == ["first"]
    assert "were over" in results["parts"]["plans"]["stopped"]
    assert results["parts"]["quickstart"]["finished"]
    assert "STOPPED" in (tmp_path / "table.md").read_text("utf-8")


def test_a_part_that_fails_is_named(tmp_path, monkeypatch):
    def broken(setting):
        raise RuntimeError("CUDA error: no kernel image")
        yield

    module = type("Part", (), {"rows": staticmethod(broken)})
    monkeypatch.setattr(gpu_check.importlib, "import_module", lambda name: module)
    code, results = run(tmp_path, "--part", "plans")
    assert code == 1
    assert "no kernel image" in results["parts"]["plans"]["stopped"]


def test_all_boxes_together_are_less_than_eight_minutes():
    assert sum(gpu_check.BOXES.values()) <= 460


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_a_machine_without_pydantic_and_the_like_can_run_it(tmp_path):
    env = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("code 0")
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["machine"]["pydantic_stand_in"] is True


def test_the_doctor_takes_measured_speeds(tmp_path):
    file = tmp_path / "results.json"
    rows = [{"assumptions": {"compute": 0.2, "launch": 2e-3}}, {"assumptions": {"compute": 0.4, "launch": 4e-3}}]
    results = {"machine": {"device": "NVIDIA H200", "date": "2026-11-30"}, "parts": {"updates": {"rows": rows}}}
    file.write_text(json.dumps(results), "utf-8")
    found = measured_assumptions(file)
    assert (found.compute, found.launch) == (pytest.approx(0.3), pytest.approx(3e-3))
    assert found.bandwidth == Assumptions().bandwidth
    command = ["doctor", "--recipe", "lingshu-7b-lora-48gb", "--device", "L40S", "--measured", str(file)]
    said = CliRunner().invoke(app, command).output
    assert "measured on NVIDIA H200" in said.replace("\n", " ")
    file.write_text(json.dumps({"parts": {}}), "utf-8")
    with pytest.raises(ValueError, match="no measured update"):
        measured_assumptions(file)
