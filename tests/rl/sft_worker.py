"""One process of a supervised training in several, started by `test_sft_distributed.py`: python sft_worker.py JOBS"""

import faulthandler
import json
import sys
from pathlib import Path

from worker import shard_on_cpu

from vitos.data.readers import read_records
from vitos.policy.vlm import SparseVLM
from vitos.rl.sft import SupervisedConfig, SupervisedTrainer


def run(job):
    lora = None
    if job["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    run = Path(job["run"])
    config = SupervisedConfig(output_dir=str(run), report_to="none", **job["options"])
    policy = SparseVLM.from_pretrained("nano", device="cpu")
    trainer = SupervisedTrainer(policy, config, read_records(job["data"]), lora=lora)
    trainer.train(resume_from_checkpoint=job["resume"])
    trainer.write(run / "warm_start", run / "adapter")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if jobs[0]["options"].get("fsdp"):
        shard_on_cpu()
    for job in jobs:
        run(job)
