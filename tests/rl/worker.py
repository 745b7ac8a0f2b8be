"""One process of a training run in several, started by tests of this folder: python worker.py JOBS.json

Accelerate knows FSDP on accelerators only. Here it is told that two CPU processes are some, and from there on its own
code shards the model.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

from vitos.data.readers import read_records
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.trainer import DualStreamTrainer


def shard_on_cpu():
    original = Trainer.create_accelerator_and_postprocess

    def create(self):
        from accelerate.utils import FullyShardedDataParallelPlugin

        original(self)
        if not self.args.fsdp:
            return
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create


def share_sampler():
    """One vLLM for all jobs of the process: its start takes longer than a run, and each run writes all weights."""
    from vitos.rl import sampler

    sampler.VllmSampler = Shared(sampler.VllmSampler)


class Shared:
    """Makes one object, and gives it to all who ask for an equal one."""

    def __init__(self, make):
        self.make, self.made = make, {}

    def __call__(self, backbone, dtype, **options):
        key = json.dumps([dtype, options], sort_keys=True)
        if key not in self.made:
            self.made[key] = self.make(backbone, dtype, **options)
        return self.made[key]


def half(run, to, metrics="metrics.jsonl"):
    """A run that was stopped in the middle: its checkpoint of two updates, and its figures."""
    run, to = Path(run), Path(to)
    to.mkdir(parents=True)
    shutil.copytree(run / "checkpoint-2", to / "checkpoint-2")
    shutil.copy(run / metrics, to / metrics)
    return to


class Dies(TrainerCallback):
    """Kills its process without a word, after an update."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def run(job):
    AcceleratorState._reset_state()  # accelerate keeps DDP or FSDP for the process
    policy = SparseVLM.from_pretrained("nano", device="cpu")
    config = DualStreamConfig(output_dir=job["run"], **job["options"])
    lora = None
    if job.get("lora"):
        from peft import LoraConfig

        torch.manual_seed(0)  # for the random start of the adapters, the same in all processes
        lora = LoraConfig(**job["lora"])
    callbacks = [Dies(*job["dies"])] if job.get("dies") else []
    trainer = DualStreamTrainer(policy, config, read_records(job["data"]), lora=lora, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=job["resume"])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)  # two processes that wait for each other say where
    jobs = json.loads(Path(sys.argv[1]).read_text())
    shard_on_cpu()
    share_sampler()
    for each in jobs:
        run(each)
