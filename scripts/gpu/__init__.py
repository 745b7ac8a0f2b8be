"""The parts of `scripts/gpu_check.py`; each has `rows(setting)`, which yields one measurement after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large.

    Attributes:
        device: the device that is checked.
        tiny: whether sizes are those of a test on a CPU.
        folder: an empty folder for files of the parts.
    """

    device: torch.device
    tiny: bool
    folder: Path
