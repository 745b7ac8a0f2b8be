"""Starting several processes of this machine, where no launcher has: `vitos train … --processes 2`.

For more than one machine, for FSDP and for anything else: `accelerate launch` and `recipes/accelerate/`.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch


def launched() -> bool:
    """Whether this is one of several processes already."""
    return "WORLD_SIZE" in os.environ


def again(processes: int) -> NoReturn:
    """Become PyTorch's launcher, which runs this very command in so many processes, on CUDA devices or on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # Threads of one process, unless the user says: all cores together.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # without it every process would train alone
    # Replaced, not waited for: Ctrl-C and kill reach the launcher itself, which stops what it started.
    os.execve(sys.executable, [*command, "-m", "vitos", *sys.argv[1:]], environment | dict(os.environ))
