"""Real peaks of tiny training runs, in bytes: a separate program, run by `tests/doctor/test_estimate.py`.

What is measured is every allocation and release that PyTorch's CPU allocator reports to the profiler, from the making
of the model to the last update. Prints one JSON line for each run: its name, the peak, and what the estimate is given.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scripts.nano_model import build_nano
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.core.record import Record
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.trainer import DualStreamTrainer

RUNS = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "adapters": {"lora": 8},
    "large vocabulary": {"vocab": 24000},
    "many siblings": {"num_reasonings": 8, "micro_batch_tokens": 6000, "gradient_checkpointing": True},
}
SIZE = 256  # pixels; 16 x 16 visual tokens


def make_policy(vocab, attention="sdpa"):
    """Qwen2.5-VL, small in all sizes but with the ratios of the 7B model: grouped queries, wide feed-forward part."""
    nano = build_nano()
    config = nano.model.config.to_dict()
    text = config["text_config"] | {
        "hidden_size": 128,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": vocab,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
    }
    vision = config["vision_config"] | {"out_hidden_size": 128}
    ids = {name: config[name] for name in config if name.endswith("_token_id")}
    made = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    made._attn_implementation = attention
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(made)
    model.generation_config = nano.model.generation_config
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16**2, "longest_edge": SIZE**2}
    )
    return SparseVLM(Qwen25VL(model.eval(), nano.tokenizer, processor))


def make_records(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    question = "<image>What is the finding in the left lung?\nA. nodule\nB. cyst"
    return [Record(f"r{i}", (folder / "a.png",), question, "A") for i in range(4)]


def train(name, options, folder):
    """Two updates: of the localization branch, then, with the optimizer's state, of the larger reasoning branch."""
    options = dict(options)
    policy = make_policy(options.pop("vocab", 3000))
    records = make_records(folder)
    lora = None
    if rank := options.pop("lora", None):
        from peft import LoraConfig

        lora = LoraConfig(r=rank, target_modules="all-linear")
    given = {
        "num_localizations": 2,
        "num_reasonings": 2,
        "questions_per_step": 2,
        "max_localization_tokens": 8,
        "max_reasoning_tokens": 16,
        "micro_batch_tokens": 1000,
    } | options
    config = DualStreamConfig(
        output_dir=str(folder / name),
        schedule="alternating",
        localization_steps=1,
        reasoning_steps=1,
        skip_equal_outcomes=False,
        save_steps=1000,
        log_samples_steps=0,
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-4,
        **given,
    )
    scan = policy.encode(records[0].image_paths[0])
    query = Query(scan, records[0].question)
    job = {
        "localize_tokens": len(policy.branches.localize_prompt(query)),
        "reason_tokens": len(policy.branches.reason_prompt(query)),
        "visual_tokens": scan.visuals[0].grid.num_tokens,
        "rank": lora.r if lora else None,
        "checkpointing": given.pop("gradient_checkpointing", False),
        "questions": given.pop("questions_per_step"),
    } | given
    config_dict = policy.backbone.model.config.to_dict()
    del scan, query
    DualStreamTrainer(policy, config, records, lora=lora).train()
    return job, config_dict


def peak_of(prof):
    """The largest sum of all allocations minus all releases so far."""
    changes = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in changes]).max()), len(changes)


def main(names):
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            gc.collect()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                job, config = train(name, RUNS[name], Path(temporary))
            gc.collect()
            peak, changes = peak_of(prof)
            print(
                json.dumps({"name": name, "peak": peak, "changes": changes, "job": job, "config": config}), flush=True
            )
    policy = make_policy(3000, attention="eager")
    with tempfile.TemporaryDirectory() as temporary:
        scan = policy.encode(make_records(Path(temporary))[0].image_paths[0])
    prompts = [policy.branches.localize_prompt(Query(scan, "<image>Where?"))] * 2
    completions = [[torch.full((20,), 300)] * 3] * 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TorchEngine(policy.backbone).score(prompts, completions)
    print(json.dumps({"name": "flops", "flops": counter.get_total_flops(), "prompt": len(prompts[0])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(RUNS))
