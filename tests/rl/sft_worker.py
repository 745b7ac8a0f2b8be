"""One process of a supervised training in several, started by `test_sft_distributed.py`: python sft_worker.py JOBS"""

import faulthandler
import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from worker import half, shard_on_cpu

from vitos.data.readers import read_records
from vitos.policy.vlm import SparseVLM
from vitos.rl.sft import SFT_METRICS, SupervisedConfig, SupervisedTrainer


def run(job):
    AcceleratorState._reset_state()  # accelerate keeps DDP or FSDP for the process
    lora = None
    if job["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    folder = Path(job["run"])
    resume = None
    if job["half_of"]:  # goes on with another run, from its middle
        if PartialState().is_main_process:
            half(job["half_of"], folder, SFT_METRICS)
        PartialState().wait_for_everyone()
        resume = str(folder / "checkpoint-2")
    config = SupervisedConfig(output_dir=str(folder), report_to="none", **job["options"])
    policy = SparseVLM.from_pretrained("nano", device="cpu")
    trainer = SupervisedTrainer(policy, config, read_records(job["data"]), lora=lora)
    trainer.train(resume_from_checkpoint=resume)
    trainer.write(folder / "warm_start", folder / "adapter")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    shard_on_cpu()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each)
