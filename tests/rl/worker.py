"""One process of a training run in several, started by `test_parallel.py`: python worker.py JOBS.json

Accelerate knows FSDP on accelerators only. Here it is told that two CPU processes are some, and from there on its own
code shards the model.
"""

import faulthandler
import json
import sys
from pathlib import Path

from accelerate.utils import DistributedType
from transformers import Trainer

from vitos.data.readers import read_records
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.trainer import DualStreamTrainer


def shard_on_cpu():
    original = Trainer.create_accelerator_and_postprocess

    def create(self):
        from accelerate.utils import FullyShardedDataParallelPlugin

        original(self)
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create


def run(job):
    policy = SparseVLM.from_pretrained("nano", device="cpu")
    config = DualStreamConfig(output_dir=job["run"], **job["options"])
    DualStreamTrainer(policy, config, read_records(job["data"])).train(resume_from_checkpoint=job["resume"])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)  # two processes that wait for each other say where
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if jobs[0]["options"].get("fsdp"):
        shard_on_cpu()
    for job in jobs:
        run(job)
