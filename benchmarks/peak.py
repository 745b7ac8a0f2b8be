"""Peak memory of a piece of work, as PyTorch's own allocator reports it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[list[int]]:
    """While the block runs; afterwards the list holds one number: bytes above what was there before, at the peak.

    On a GPU it is the allocator's own counter. On a CPU the profiler records every allocation and release, which costs
    time: never measure both at once.

    Args:
        device: whose memory; by default the GPU's if there is one.
    """
    found: list[int] = []
    if device.type == "cuda" if device else torch.cuda.is_available():
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield found
    profiler: Any = record.profiler
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    running = np.cumsum([event.nbytes() for event in changes])
    found.append(int(running.max(initial=0)))


def peak_of_process() -> float:
    """MiB that this process has held at most: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
