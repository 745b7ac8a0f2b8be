"""Memory and speed of GPUs by name, for estimates. Importable without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        name: name in tables.
        memory: memory that PyTorch reports, in bytes; less than the size in the name.
        flops: peak rate of dense bfloat16 products, in operations per second.
        bandwidth: peak rate of its memory, in bytes per second.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float


def _device(name: str, gib: float, teraflops: float, terabytes: float) -> Device:
    return Device(name, round(gib * GIB), teraflops * 1e12, terabytes * 1e12)


# Memory: the smallest "total capacity" that PyTorch's out-of-memory errors name in public issues (docs/hours.md).
# Peaks: without sparsity and with float32 accumulation, from the vendor's data sheets.
DEVICES = {
    device.name: device
    for device in (
        _device("A10 24GB", 22.03, 125, 0.6),
        _device("A100 40GB", 39.38, 312, 1.555),
        _device("A100 80GB", 79.14, 312, 2.039),
        _device("B200 180GB", 178.35, 2250, 8.0),
        _device("H100 80GB", 79.10, 989, 3.35),
        _device("H100 NVL 94GB", 93.0, 835, 3.9),
        _device("H100 PCIe 80GB", 79.10, 756, 2.0),
        _device("H200 141GB", 139.72, 989, 4.8),
        _device("L4 24GB", 22.03, 121, 0.3),
        _device("L40 48GB", 44.34, 181, 0.864),
        _device("L40S 48GB", 44.34, 362, 0.864),
        _device("RTX 3090 24GB", 23.5, 71, 0.936),
        _device("RTX 4090 24GB", 23.5, 165, 1.008),
        _device("RTX 5090 32GB", 31.36, 209, 1.792),
        _device("RTX 6000 Ada 48GB", 47.3, 364, 0.96),
        _device("RTX A6000 48GB", 47.3, 155, 0.768),
    )
}
_FIGURES = re.compile(r"([\d.]+) ?GB[, ]+([\d.]+) ?TFLOPS?[, ]+([\d.]+) ?TB/s", re.IGNORECASE)
# Words of a full name ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3") that tell no two devices of the table apart.
_NOISE = frozenset(
    ["nvidia", "geforce", "rtx", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e", "generation", "gpu"]
)


def find_device(text: str) -> Device:
    """A device by its name, by a part of it, by the name that its driver reports, or by figures.

    >>> find_device("H100").name, find_device("4090").name, find_device("NVIDIA A100-SXM4-40GB").name
    ('H100 80GB', 'RTX 4090 24GB', 'A100 40GB')
    >>> find_device("80GB 989TFLOPS 3.35TB/s").bandwidth
    3350000000000.0

    Raises:
        ValueError: for any other text, and for a part that two devices have in common; names the candidates.
    """
    if figures := _FIGURES.fullmatch(text.strip()):
        memory, flops, bandwidth = map(float, figures.groups())
        return Device(text.strip(), round(memory * 1e9), flops * 1e12, bandwidth * 1e12)
    wanted = _words(text)
    found = [device for device in DEVICES.values() if wanted and wanted <= _words(device.name)]
    if not found:  # a driver's name may hold words that ours lacks, such as the socket
        sizes = {word for word in wanted if word.endswith("gb")}
        found = [d for d in DEVICES.values() if _model(d) <= wanted and sizes <= _words(d.name)]
        found = [device for device in found if len(_model(device)) == max(len(_model(d)) for d in found)]
    shortest = min((len(_words(device.name)) for device in found), default=0)
    found = [device for device in found if len(_words(device.name)) == shortest]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{text!r} may be {' or '.join(device.name for device in found)}; name one of them")
    raise ValueError(
        f'unknown device {text!r}; give one of {", ".join(DEVICES)}, or figures: "80GB 989TFLOPS 3.35TB/s"'
    )


def _words(name: str) -> frozenset[str]:
    """Parts of a name that tell devices apart: "RTX4090" and "rtx 4090" have the same."""
    spaced = re.sub(r"rtx\s*(?=\w)", "rtx ", re.sub(r"(\d+)\s*gb", r" \1gb ", name.lower()))
    return frozenset(re.findall(r"[a-z0-9]+", spaced)) - _NOISE


def _model(device: Device) -> frozenset[str]:
    """The words of a device's name without its capacity."""
    return frozenset(word for word in _words(device.name) if not word.endswith("gb"))


def detected_device() -> Device | None:
    """The first CUDA GPU of this machine, or None.

    Its memory is what it reports; its peaks are those of the device of its name. A GPU with an unknown name gets the
    peaks of an A100.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
    try:
        known = find_device(name)
    except ValueError:
        known, name = DEVICES["A100 40GB"], f"{name}, taken as fast as an A100"
    return Device(name, memory, known.flops, known.bandwidth)
