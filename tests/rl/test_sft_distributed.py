"""Supervised training in one process against two, with DDP and with FSDP2, on the CPU (gloo), with and without
adapters: losses and weights; and a resumed training against the uninterrupted one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import FSDP, launch

from vitos.data.phantom import write_phantoms
from vitos.policy.locate import resolve_model_path
from vitos.rl.callbacks import read_metrics
from vitos.rl.sft import SFT_METRICS

WORKER = Path(__file__).with_name("sft_worker.py")
OPTIONS = {
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,  # so that rounding is not blown up where a gradient is nearly 0
    "weight_decay": 0.01,
    "answer_weight": 2.0,
    "by_image": True,
    "seed": 3,
    "save_steps": 2,
    "logging_steps": 1,
    "micro_batch_tokens": 200,  # the processes have different numbers of micro-batches
    "disable_tqdm": True,
    "use_cpu": True,
}
# With several processes activations are computed again in the backward pass, with one they are kept.
WAYS = {
    "one": {},
    "ddp": {"gradient_checkpointing": True},
    "fsdp": FSDP | {"fsdp_config": FSDP["fsdp_config"] | {"activation_checkpointing": True}},
}
KINDS = ("", "-lora")


def jobs_of(base, way):
    """With and without adapters: a whole run, one that goes on with it, and one that goes on with one process's."""

    def job(kind, first=None):
        return {
            "data": str(base / "data" / "train.json"),
            "run": str(base / (f"{first}-then-{way}{kind}" if first else way + kind)),
            "half_of": str(base / (first + kind)) if first else None,
            "lora": bool(kind),
            "options": OPTIONS | WAYS[way],
        }

    firsts = (None,) if way == "one" else (None, way, "one")
    return [job(kind, first) for kind in KINDS for first in firsts]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_phantoms(folder / "data", "train", 6)
    launch(WORKER, jobs_of(folder, "one"), folder, 1)
    launch(WORKER, jobs_of(folder, "ddp") + jobs_of(folder, "fsdp"), folder, 2)
    return folder


way = pytest.mark.parametrize("way", ["ddp", "fsdp"])


def written(base, run):
    return load_file(base / run / "warm_start" / "model.safetensors")


def figures(base, run):
    rows = read_metrics(base / run / SFT_METRICS)
    return [{name: row[name] for name in ("step", "loss", "tokens", "grad_norm")} for row in rows]


@pytest.mark.slow
@way
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begun", ["by them", "by one process"])
def test_two_processes_are_one(begun, kind, way, base):
    name, other = (f"{way}{kind}" if begun == "by them" else f"one-then-{way}{kind}"), f"one{kind}"
    rows, expected = figures(base, name), figures(base, other)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    start = load_file(Path(resolve_model_path("nano")) / "model.safetensors")
    ours, theirs = written(base, name), written(base, other)
    assert ours.keys() == theirs.keys()
    moved = sum((theirs[n].float() - start[n].float()).square().sum() for n in theirs).sqrt()
    apart = sum((ours[n].float() - theirs[n].float()).square().sum() for n in theirs).sqrt()
    assert float(moved) > 0.01
    assert float(apart / moved) < 1e-3
    if kind:
        alone, together = (load_file(base / run / "adapter" / "adapter_model.safetensors") for run in (other, name))
        assert alone.keys() == together.keys()


@pytest.mark.slow
@way
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_the_uninterrupted_one(kind, way, base):
    whole, resumed = f"{way}{kind}", f"{way}-then-{way}{kind}"
    assert figures(base, resumed) == figures(base, whole)
    ours, theirs = written(base, resumed), written(base, whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
