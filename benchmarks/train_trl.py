"""Training steps of TRL's `GRPOTrainer` to be measured; needs the `bench` extra.

What is timed are two of its private methods, so the extra names the versions that have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import Qwen2_5_VLProcessor
from trl import GRPOConfig, GRPOTrainer

from benchmarks.train_shapes import question_text
from benchmarks.train_turns import Job, Meter, Turns, noise
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM


def run(job: Job, policy: SparseVLM, images: Sequence[Path], meter: Meter, out: Path) -> None:
    """Make the job's steps; micro-batches of the update have at most `micro_batch_tokens`, as ours."""
    backbone, spec = policy.backbone, policy.spec
    backbone.tokenizer.padding_side = "left"  # as TRL pads, which takes the processor's own padding for it
    # The combined processor insists on one for videos, which insists on torchvision.
    checks = {"check_argument_for_proper_class": lambda *_: None}
    processor = type("Qwen2_5_VLProcessor", (Qwen2_5_VLProcessor,), checks)(
        backbone.image_processor, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template
    )
    for module in backbone.vision_modules:
        module.requires_grad_(False)
    rows = []
    for index, path in enumerate(images):
        question = question_text(index)
        texts = [spec.localize_text(question), *[spec.reason_text(question)] * job.group]
        rows += [
            {"prompt": [{"role": "user", "content": t.replace(IMAGE_PLACEHOLDER, "")}], "image": str(path)}
            for t in texts
        ]
    prompt = policy.branches.localize_prompt(Query(policy.encode(images[0]), question_text(0)))
    size = _divisor(job.completions, job.micro_batch_tokens // (len(prompt) + job.tokens))
    config = GRPOConfig(
        output_dir=str(out),
        max_steps=job.steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=job.completions // size,
        num_generations=job.group,
        max_completion_length=job.tokens,
        generation_kwargs={
            "min_new_tokens": job.tokens,
            "suppress_tokens": list(backbone.banned_token_ids),
        },
        learning_rate=1e-6,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=backbone.model,
        args=config,
        reward_funcs=lambda completions, **_: [noise(c[0]["content"]) for c in completions],
        train_dataset=Dataset.from_list(rows).cast_column("image", ImageFeature()),
        processing_class=processor,
        callbacks=[Turns(job, meter)],
    )
    generate, forward = trainer._generate_single_turn, trainer._compute_loss

    def counted_generate(prompt_ids: Sequence[Sequence[int]], *args: Any) -> Any:
        meter.prompt_tokens += sum(map(len, prompt_ids))
        with meter.span("sample"):
            return generate(prompt_ids, *args)

    def counted_forward(model: Any, inputs: Mapping[str, Any]) -> Any:
        meter.prompt_tokens += int(inputs["prompt_mask"].sum())
        if int(inputs["completion_mask"].sum()) != size * job.tokens:
            raise ValueError("TRL's completions are not all of the same length")
        with meter.span("score"):
            return forward(model, inputs)

    trainer._generate_single_turn, trainer._compute_loss = counted_generate, counted_forward
    trainer.accelerator.backward = meter.timed("backward", trainer.accelerator.backward)
    trainer.train()


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, at least 1."""
    return next(d for d in range(max(1, min(number, most)), 0, -1) if number % d == 0)
