"""Starting several processes on this machine without a launcher: `vitos train … --processes 2`.

For several machines, for FSDP and for everything else: `accelerate launch` and `recipes/accelerate/`.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch


def launched() -> bool:
    """Whether a launcher has already started this process."""
    return "WORLD_SIZE" in os.environ


def relaunch(processes: int) -> NoReturn:
    """Become PyTorch's launcher, which runs this command in several processes, on CUDA devices or on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # Threads per process, unless the user sets them: together they use all cores.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # without it each process would train alone
    # Replace this process instead of waiting: then Ctrl-C and kill reach the launcher, which stops its processes.
    os.execve(sys.executable, [*command, "-m", "vitos", *sys.argv[1:]], environment | dict(os.environ))
