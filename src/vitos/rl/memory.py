"""Memory that is taken from a device, by whatever takes it: torch, vLLM, other libraries."""

from __future__ import annotations

import psutil
import torch


def gib_in_use(device: torch.device) -> float:
    """GiB in use: all memory that is not free on a CUDA device; on others, the resident memory of this process.

    Torch and vLLM keep what they have taken until they are told to give it back, so on a CUDA device the value at the
    end of a phase is the phase's peak.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
