"""Supervised training in one process against two, with DDP and with FSDP2, on the CPU (gloo), with and without
adapters: losses and weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics
from vitos.rl.sft import SFT_METRICS

WORKER = Path(__file__).with_name("sft_worker.py")
OPTIONS = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,  # so that rounding is not blown up where a gradient is nearly 0
    "weight_decay": 0.01,
    "answer_weight": 2.0,
    "by_image": True,
    "seed": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "micro_batch_tokens": 200,  # the processes have different numbers of micro-batches
    "disable_tqdm": True,
    "use_cpu": True,
}
WAYS = {"ddp": {}, "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}}


def launch(jobs, folder, processes):
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} if processes > 1 else {}
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        with (folder / f"log-{rank}.txt").open("w") as log:
            command = [sys.executable, str(WORKER), str(path)]
            environment = os.environ | shared | size | place
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=1200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * processes, "\n".join((folder / f"log-{r}.txt").read_text()[-4000:] for r in range(processes))


def jobs_of(base, way):
    """With and without adapters; and, without, a run of one process that is gone on with."""
    options = OPTIONS | WAYS.get(way, {})
    data = str(base / "data" / "train.json")
    made = [
        {"data": data, "run": str(base / f"{way}{kind}"), "resume": None, "lora": bool(kind), "options": options}
        for kind in ("", "-lora")
    ]
    if way != "one":
        folder = base / f"one-then-{way}"
        folder.mkdir()
        shutil.copytree(base / "one" / "checkpoint-2", folder / "checkpoint-2")
        shutil.copy(base / "one" / SFT_METRICS, folder)
        made.append(made[0] | {"run": str(folder), "resume": str(folder / "checkpoint-2")})
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_phantoms(folder / "data", "train", 6)
    launch(jobs_of(folder, "one"), folder, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(WAYS))
def test_two_processes_are_one(way, base):
    launch(jobs_of(base, way), base, 2)
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    for name, other in ((way, "one"), (f"{way}-lora", "one-lora"), (f"one-then-{way}", "one")):
        rows, expected = (read_metrics(base / run / SFT_METRICS) for run in (name, other))
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row, wanted in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert row["tokens"] == wanted["tokens"]
        ours, theirs = (load_file(base / run / "warm_start" / "model.safetensors") for run in (name, other))
        assert ours.keys() == theirs.keys()
        moved = sum((theirs[n].float() - start[n].float()).square().sum() for n in theirs).sqrt()
        apart = sum((ours[n].float() - theirs[n].float()).square().sum() for n in theirs).sqrt()
        assert float(moved) > 0.01
        assert float(apart / moved) < 1e-3, name
    alone, together = (
        load_file(base / f"{run}-lora" / "adapter" / "adapter_model.safetensors") for run in ("one", way)
    )
    assert alone.keys() == together.keys()
