"""Processes that tests start: several that work together (gloo), and servers."""

import json
import os
import socket
import subprocess
import sys
import time

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
WAYS = {"ddp": {}, "fsdp": FSDP}  # options of several processes by their way to work together


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(worker, jobs, folder, processes=2):
    """Run a script with the jobs, in processes that import torch once; one alone gets no launcher's environment."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
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


def page_of(address, server, seconds=180):
    """The text at an address as soon as it is served; None: the server ended, or the time did."""
    import httpx

    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            return httpx.get(address, timeout=30).raise_for_status().text
        except httpx.HTTPError:
            time.sleep(0.1)
    return None
