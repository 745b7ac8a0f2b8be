"""What vLLM takes for a batch of rollouts: a roofline with two shares, checked against published runs. No torch.

A step of decoding reads all weights and the keys and values of all running sequences, and multiplies each sequence's
token with all weights. Its time is the sum of both at the device's peaks, divided by `VllmAssumptions.decode`; a
prefill is its operations at the peak rate divided by `VllmAssumptions.prefill`. The sum, not the maximum, describes
the published runs of three devices (`PUBLISHED`) best. Both shares are chosen so that no published run is promised
more than 2 % above what it gave; most gave more (`tests/doctor/test_vllm_speed.py`, docs/hours.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vitos.doctor.devices import Device
from vitos.doctor.shapes import ModelShape

SIXTEEN_BITS = 2
WORKSPACE = 2 << 30
"""Bytes that vLLM needs beside weights and cache (activations of a prefill step, CUDA graphs): an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmAssumptions:
    """What is assumed of vLLM.

    Attributes:
        prefill: share of `Device.flops` that a prefill reaches.
        decode: share of the roofline that a step of decoding reaches, in the version of the published runs.
        engine: speed of today's engine (V1, vLLM 0.8 and later) compared with theirs (V0): the smaller of two
            published figures (docs/hours.md).
    """

    prefill: float = 0.6
    decode: float = 0.37
    engine: float = 1.14


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """Requests per second that somebody measured with vLLM on one device, all requests sent at once.

    Attributes:
        device: name of the device.
        prompt: number of tokens per prompt.
        written: number of tokens per completion.
        requests: requests per second.
    """

    device: str
    prompt: int
    written: int
    requests: float


PUBLISHED_SOURCE = (
    "model card of RedHatAI/DeepSeek-R1-Distill-Qwen-7B-quantized.w4a16, section 'Multi-stream asynchronous "
    "performance', rows of the bfloat16 model, vLLM 0.7.2 (2025-02)"
)
_PROFILES = ((256, 128), (512, 256), (768, 128), (1024, 128), (256, 1024), (1024, 1024), (4096, 512))
_REQUESTS = {
    "RTX A6000 48GB": (14.9, 7.1, 7.4, 5.9, 2.0, 1.5, 1.1),
    "A100 80GB": (26.4, 13.0, 14.5, 11.4, 4.4, 3.3, 2.3),
    "H100 80GB": (54.3, 26.0, 32.1, 26.7, 8.0, 6.6, 5.2),
}
# The language model of DeepSeek-R1-Distill-Qwen-7B has the sizes of Qwen2.5-VL-7B's and Lingshu-7B's.
PUBLISHED = tuple(
    PublishedRun(device, prompt, written, requests)
    for device, row in _REQUESTS.items()
    for (prompt, written), requests in zip(_PROFILES, row, strict=True)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Requests that are sent together.

    Attributes:
        prompts: number of prompts.
        prompt: length of a prompt.
        siblings: number of completions per prompt, which share its keys (vLLM's prefix cache).
        longest: length of a completion.
    """

    prompts: int
    prompt: int
    siblings: int
    longest: int


def kv_bytes(shape: ModelShape) -> int:
    """Bytes of one token's keys and values in all layers, in 16 bits."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * SIXTEEN_BITS


def most_sequences(device: Device) -> int:
    """vLLM's own limit of sequences that run at once (`vllm/engine/arg_utils.py`, 0.32)."""
    return 1024 if device.memory >= 70 << 30 and "a100" not in device.name.lower() else 256


def running(shape: ModelShape, load: Rollouts, cache: float, limit: int) -> float:
    """Number of sequences that run at once: as many as there are, as the cache holds, and as vLLM admits.

    Args:
        cache: bytes for keys and values.
        limit: largest number of sequences (`max_num_seqs`).
    """
    held = cache / (kv_bytes(shape) * (load.longest + load.prompt / load.siblings))
    return max(1.0, min(load.prompts * load.siblings, held, limit))


def step_seconds(
    shape: ModelShape, device: Device, sequences: float, context: float, assumed: VllmAssumptions, shards: int = 1
) -> float:
    """Seconds of one decoded token of all running sequences.

    Args:
        sequences: number of running sequences.
        context: their mean length.
        shards: number of devices over which vLLM splits the model (tensor parallel).
    """
    weights = shape.active_parameters + shape.hidden * shape.vocab
    read = (SIXTEEN_BITS * weights + sequences * context * kv_bytes(shape)) / device.bandwidth
    products = 2.0 * weights * sequences / device.flops
    return (read + products) / (assumed.decode * assumed.engine * shards)


def rollout_seconds(
    shape: ModelShape,
    device: Device,
    load: Rollouts,
    cache: float,
    limit: int,
    assumed: VllmAssumptions = VllmAssumptions(),
    shards: int = 1,
) -> dict[str, float]:
    """Seconds of prefill and of decoding, each completion at its full length.

    Each prompt runs once. Sequences that end are replaced by waiting ones; the last ones run alone, so the number of
    running sequences is followed wave by wave.
    """
    weights = 2.0 * shape.active_parameters * load.prompt
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * load.prompt**2
    head = 2.0 * shape.hidden * shape.vocab
    prefill = load.prompts * (weights + attention + head) / (assumed.prefill * device.flops * shards)
    total, at_once = load.prompts * load.siblings, running(shape, load, cache, limit)
    context = load.prompt + load.longest / 2
    bounds = [min(total, wave * at_once) for wave in range(int(-(-total // at_once)) + 1)]
    waves = [above - below for below, above in pairwise(bounds)]
    decode = sum(load.longest * step_seconds(shape, device, size, context, assumed, shards) for size in waves)
    return {"prefill": prefill, "decode": decode}
