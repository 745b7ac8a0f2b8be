"""Rollouts of vLLM in each of two and four processes (gloo): the run of one process, to rounding. `make test-vllm`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.processes import FSDP, WAYS, launch
from tests.rl.test_distributed import OPTIONS, WORKER

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytest.importorskip("peft")

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
SAMPLER = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "block_size": 32}
VLLM = {
    "sampler": "vllm",
    "sampler_options": SAMPLER | {"kv_cache_memory_bytes": 64 << 20},
    "localization_steps": 2,
    "reasoning_steps": 1,
    "oversampling_rounds": 0,
    "skip_equal_outcomes": False,
    "max_reasoning_tokens": 10,
}
LORA = {"r": 4, "lora_alpha": 64, "target_modules": r".*language_model.*(q_proj|v_proj|up_proj)"}


def job(base, name, resume=None, lora=False, dies=None, **options):
    return {
        "data": str(base / "data" / "train.json"),
        "run": str(base / name),
        "resume": resume,
        "lora": LORA if lora else None,
        "dies": dies,
        "options": OPTIONS | VLLM | options,
    }


def launched(jobs, base, processes):
    """The same as `launch`, by torch's launcher, which names the process that has died; its output."""
    (base / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, WORKER, base / "jobs.json"], capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in one, two and four processes, by name; "killed" began in four; and the output of the killed one."""
    base = tmp_path_factory.mktemp("vllm")
    write_phantoms(base / "data", "train", 8)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)
        launch(WORKER, [job(base, "one"), job(base, "one-lora", lora=True)], base, 1)
        killed = launched([job(base, "killed", lora=True, dies=[1, 2])], base, 4)
        for processes in (2, 4):
            jobs = [
                job(base, f"{way}-{processes}{'-lora' * lora}", lora=lora, **options)
                for way, options in WAYS.items()
                for lora in (False, True)
            ]
            go_on = [job(base, "killed", resume=True, lora=True, **FSDP)] if processes == 2 else []
            launch(WORKER, jobs + go_on, base, processes)
    return base, killed


NAMES = [f"{way}-{n}{kind}" for n in (2, 4) for way in WAYS for kind in ("", "-lora")] + ["killed"]


def reference(name):
    return "one-lora" if name.endswith("lora") or name == "killed" else "one"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_one_process(name, runs):
    base, _ = runs
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    expected, found = (load_file(base / run / "model" / "model.safetensors") for run in (reference(name), name))
    assert found.keys() == expected.keys()
    moved = sum((expected[n] - start[n]).square().sum() for n in expected).sqrt()
    apart = sum((expected[n] - found[n]).square().sum() for n in expected).sqrt()
    assert float(moved) > 0.02
    assert float(apart / moved) < 1e-3
    assert all((found[n] == start[n]).all() for n in found if "visual." in n)


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_one_process_and_the_engines_agree(name, runs):
    base, _ = runs
    rows, expected = (read_metrics(base / run / "metrics.jsonl") for run in (name, reference(name)))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert row["sampler/tensors"] == other["sampler/tensors"]
        assert row["sampler/logprob_gap"] < 1e-4
        for branch in ("localization", "reasoning"):
            assert abs(row.get(f"mismatch_kl/{branch}", 0.0)) < 1e-6
        for key, value in other.items():
            if not key.startswith(("seconds/", "memory/", "mismatch_kl", "sampler/")) and key != "total_flos":
                assert value is None or row[key] == pytest.approx(value, rel=5e-3, abs=1e-4), (row["step"], key)


def test_the_base_of_adapters_does_not_move(runs):
    base, _ = runs
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    found = load_file(base / "fsdp-4-lora" / "model" / "model.safetensors")
    moved = {n for n in found if not (found[n] == start[n]).all()}
    assert moved
    assert all(any(place in n for place in ("q_proj", "v_proj", "up_proj")) for n in moved)


def test_a_killed_process_ends_the_run_by_name(runs):
    base, (code, output) = runs
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output
    assert "rank      : 1" in output
    assert len(read_metrics(base / "killed" / "metrics.jsonl")) == 3  # of the run that was continued
