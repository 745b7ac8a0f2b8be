"""Starts a worker of this folder in several processes (gloo), each of which imports torch once for all its jobs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
WAYS = {"ddp": {}, "fsdp": FSDP}  # options of several processes by their way to work together


def launch(worker, jobs, folder, processes=2):
    """Run the jobs one after the other; one process gets no environment of a launcher."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in range(processes):
        own = {"OMP_NUM_THREADS": 1} | (shared | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {})
        environment = os.environ | {name: str(value) for name, value in own.items()}
        with (folder / f"log-{rank}.txt").open("w") as log:
            command = [sys.executable, str(worker), str(path)]
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=1200) for process in running]
    finally:
        for process in running:
            process.kill()
    logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-4000:] for rank in range(processes))
    assert codes == [0] * processes, logs


def half(run, to, metrics="metrics.jsonl"):
    """A run that was stopped in the middle: its checkpoint of two updates, and its figures."""
    run, to = Path(run), Path(to)
    to.mkdir(parents=True)
    shutil.copytree(run / "checkpoint-2", to / "checkpoint-2")
    shutil.copy(run / metrics, to / metrics)
    return to
