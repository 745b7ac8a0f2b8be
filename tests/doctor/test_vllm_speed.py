"""The estimate of vLLM's speed against runs that others published, and against a simulation step by step."""

import math
import re
from pathlib import Path
from statistics import median

import pytest

from vitos.doctor.devices import DEVICES
from vitos.doctor.shapes import find_config, model_shape
from vitos.doctor.vllm_speed import (
    PUBLISHED,
    WORKSPACE,
    Rollouts,
    VllmAssumptions,
    kv_bytes,
    most_sequences,
    rollout_seconds,
    step_seconds,
)

V0 = VllmAssumptions(engine=1.0)  # the published runs are of vLLM 0.7.2
DOCS = Path(__file__).parents[2] / "docs/hours.md"


@pytest.fixture(scope="module")
def shape():
    return model_shape(find_config("Qwen2.5-VL-7B-Instruct"), max_pixels=1_003_520)


def promised(shape, run):
    """Requests per second of many like requests, by the estimate."""
    device, many = DEVICES[run.device], 4096
    cache = 0.9 * device.memory - 2 * shape.text_parameters - WORKSPACE
    load = Rollouts(prompts=many, prompt=run.prompt, siblings=1, longest=run.written)
    return many / sum(rollout_seconds(shape, device, load, cache, 256, V0).values())


def test_no_published_run_is_promised_more_than_it_gave(shape):
    ratios = {run: promised(shape, run) / run.requests for run in PUBLISHED}
    assert max(ratios.values()) < 1.02, ratios
    assert 0.7 < median(ratios.values()) < 0.9  # nor far less
    assert all(ratio > 0.6 for ratio in ratios.values()), ratios


def test_larger_shares_would_promise_too_much(shape):
    """The shares are the largest that hold, to two digits."""
    for share in (VllmAssumptions(engine=1.0, decode=0.39), VllmAssumptions(engine=1.0, prefill=0.7)):
        over = []
        for run in PUBLISHED:
            device = DEVICES[run.device]
            cache = 0.9 * device.memory - 2 * shape.text_parameters - WORKSPACE
            load = Rollouts(prompts=4096, prompt=run.prompt, siblings=1, longest=run.written)
            over.append(4096 / sum(rollout_seconds(shape, device, load, cache, 256, share).values()) / run.requests)
        assert max(over) > 1.02


def test_the_table_of_published_runs_is_that_of_the_documentation(shape):
    rows = re.findall(
        r"^\| (.+GB) \| (\d+) / (\d+) \| ([\d.]+) \| ([\d.]+) \|$", DOCS.read_text("utf-8"), re.MULTILINE
    )
    assert rows == [
        (run.device, str(run.prompt), str(run.written), f"{run.requests:g}", f"{promised(shape, run):.1f}")
        for run in PUBLISHED
    ]


def test_waves_are_those_of_a_simulation(shape):
    """Sequences of one length, in waves of as many as may run; each step costs what its sequences cost."""
    device, load = DEVICES["H100 80GB"], Rollouts(prompts=7, prompt=500, siblings=5, longest=20)
    steps, waiting = 0.0, 35
    while waiting:
        now = min(waiting, 16)
        steps += 20 * step_seconds(shape, device, now, 510, V0)
        waiting -= now
    assert rollout_seconds(shape, device, load, 1e12, 16, V0)["decode"] == pytest.approx(steps)


def test_a_small_cache_holds_few_sequences(shape):
    device, load = DEVICES["H100 80GB"], Rollouts(prompts=10, prompt=1000, siblings=4, longest=1000)
    each = kv_bytes(shape) * (1000 + 250)
    wide, narrow = (rollout_seconds(shape, device, load, n * each, 256)["decode"] for n in (40, 10))
    assert wide < narrow < 4 * wide
    assert math.isfinite(rollout_seconds(shape, device, load, 0, 256)["decode"])


def test_limits_are_those_of_vllm():
    limits = {name: most_sequences(device) for name, device in DEVICES.items()}
    assert limits["H100 80GB"] == limits["H200 141GB"] == 1024
    assert limits["A100 80GB"] == limits["L40S 48GB"] == 256
