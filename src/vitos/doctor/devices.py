"""Memory and speed of GPUs by name, for estimates. Importable without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        name: name in tables.
        memory: size of its memory in bytes.
        flops: peak rate of dense bfloat16 products, in operations per second.
        bandwidth: peak rate of its memory, in bytes per second.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float


# Peaks without sparsity, from the vendors' data sheets.
DEVICES = {
    device.name: device
    for device in (
        Device("A100 40GB", 40 * GB, 312e12, 1.555e12),
        Device("A100 80GB", 80 * GB, 312e12, 2.039e12),
        Device("H100 80GB", 80 * GB, 989e12, 3.35e12),
        Device("H200 141GB", 141 * GB, 989e12, 4.8e12),
        Device("L40S 48GB", 48 * GB, 362e12, 0.864e12),
        Device("4090 24GB", 24 * GB, 165e12, 1.008e12),
    )
}
_FIGURES = re.compile(r"([\d.]+) ?GB[, ]+([\d.]+) ?TFLOPS?[, ]+([\d.]+) ?TB/s", re.IGNORECASE)


def find_device(text: str) -> Device:
    """A device by its name in `DEVICES`, or by its figures: "80GB 989TFLOPS 3.35TB/s".

    Raises:
        ValueError: for any other text; names the known devices.
    """
    wanted = text.lower().replace(" ", "")
    for name, device in DEVICES.items():
        if name.lower().replace(" ", "") == wanted:
            return device
    if figures := _FIGURES.fullmatch(text.strip()):
        memory, flops, bandwidth = map(float, figures.groups())
        return Device(text.strip(), round(memory * GB), flops * 1e12, bandwidth * 1e12)
    raise ValueError(
        f'unknown device {text!r}; give one of {", ".join(DEVICES)}, or figures: "80GB 989TFLOPS 3.35TB/s"'
    )


def detected_device() -> Device | None:
    """The first CUDA GPU of this machine, or None.

    Its memory is what it reports; its peaks are those of the device in `DEVICES` that its name contains. A GPU with
    another name gets the peaks of an A100.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
    known = [device for device in DEVICES.values() if device.name.split(" ")[0].lower() in name.lower()]
    peaks = known[0] if known else DEVICES["A100 40GB"]
    return Device(name if known else f"{name}, taken as fast as an A100", memory, peaks.flops, peaks.bandwidth)
