"""Names of devices, as users type them and as drivers report them."""

import pytest
import torch

from vitos.doctor.devices import DEVICES, GIB, detected_device, find_device


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100 80GB"),
        ("h100 80gb", "H100 80GB"),
        ("H100-80GB", "H100 80GB"),
        ("H100 80 GB", "H100 80GB"),
        ("h100 pcie", "H100 PCIe 80GB"),
        ("H200", "H200 141GB"),
        ("A100 40GB", "A100 40GB"),
        ("A100-80GB", "A100 80GB"),
        ("L40S", "L40S 48GB"),
        ("L40", "L40 48GB"),
        ("L4", "L4 24GB"),
        ("RTX 4090", "RTX 4090 24GB"),
        ("rtx4090", "RTX 4090 24GB"),
        ("4090", "RTX 4090 24GB"),
        ("4090 24GB", "RTX 4090 24GB"),
        ("3090", "RTX 3090 24GB"),
        ("A6000", "RTX A6000 48GB"),
        ("RTX 6000 Ada", "RTX 6000 Ada 48GB"),
        # torch.cuda.get_device_name
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H100 NVL", "H100 NVL 94GB"),
        ("NVIDIA H200", "H200 141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA L40S", "L40S 48GB"),
        ("NVIDIA L4", "L4 24GB"),
        ("NVIDIA A10", "A10 24GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("NVIDIA RTX A6000", "RTX A6000 48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA B200", "B200 180GB"),
    ],
)
def test_a_device_is_found_by_the_names_that_it_goes_by(text, name):
    assert find_device(text).name == name


@pytest.mark.parametrize("text", ["A100", "a100 sxm4", "NVIDIA A100-SXM4"])
def test_a_name_that_two_devices_share_is_not_guessed(text):
    with pytest.raises(ValueError, match="may be A100 40GB or A100 80GB; name one of them"):
        find_device(text)


@pytest.mark.parametrize(
    "text", ["", "GPU", "H1000", "V100", "A100 20GB", "H100 20GB", "80GB", "NVIDIA", "Radeon 4090X"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match=r"unknown device|may be"):
        find_device(text)


def test_a_device_holds_less_than_its_name_says():
    for device in DEVICES.values():
        named = float(device.name.rsplit(" ", 1)[1].removesuffix("GB"))
        assert 0.9 * named * 1e9 < device.memory < 1.07 * named * 1e9
    assert DEVICES["H100 80GB"].memory / GIB == pytest.approx(79.1)


@pytest.mark.parametrize(
    ("reported", "gib", "like"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.39, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 79.18, "H100 80GB"),
        ("NVIDIA L40S", 44.39, "L40S 48GB"),
        ("NVIDIA GeForce RTX 4090", 23.64, "RTX 4090 24GB"),
        ("Tesla T4", 14.56, "A100 40GB"),
    ],
)
def test_the_gpu_of_this_machine(monkeypatch, reported, gib, like):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: reported)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (0, round(gib * GIB)))
    found = detected_device()
    assert found.memory == round(gib * GIB)
    assert found.bandwidth == DEVICES[like].bandwidth
    assert ("taken as fast as" in found.name) == (reported == "Tesla T4")
