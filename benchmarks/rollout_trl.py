"""Rollouts by TRL's colocated vLLM, for `rollout_engines.py`; needs the extras `bench` and `vllm`.

TRL hands vLLM whole images and no other options of a request, so nothing can be pruned: both branches see all visual
tokens. It also passes no number format and no option for a machine without a GPU. They are set here, to those of our
own engine, or vLLM would compute in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from transformers import Qwen2_5_VLProcessor
from trl.generation import vllm_generation

from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.policy.vlm import SparseVLM

Chat = tuple[str, Image.Image]
"""A user message with one image, and the image."""


class TrlRollouts:
    """vLLM as TRL's `GRPOTrainer` starts it in its own process, with a policy's weights.

    Args:
        policy: a Qwen2.5-VL policy.
        folder: an empty folder for its checkpoint.
        tokens: longest completion.
        options: arguments of `vllm.LLM` besides those that TRL passes.
    """

    def __init__(self, policy: SparseVLM, folder: Path, tokens: int, options: Mapping[str, Any]) -> None:
        backbone = policy.backbone
        self.tokenizer = backbone.tokenizer
        backbone.model.save_pretrained(folder)
        Qwen2_5_VLProcessor.from_pretrained(_saved(policy, folder)).save_pretrained(folder)
        backbone.model.name_or_path = str(folder)
        plain = vllm_generation.LLM
        vllm_generation.LLM = partial(plain, **options)
        try:
            self.generation = vllm_generation.VLLMGeneration(
                backbone.model,
                Accelerator(cpu=True),
                backbone.tokenizer,
                max_model_length=options.get("max_model_len"),
                temperature=1.0,
                max_completion_length=tokens,
            )
        finally:
            vllm_generation.LLM = plain

    def write(self, chats: Sequence[Chat], times: int) -> int:
        """Sample `times` completions per message; the number of tokens written."""
        prompts = [self._ids(text) for text, _ in chats for _ in range(times)]
        images = [[image] for _, image in chats for _ in range(times)]
        _, completions, _, _ = self.generation.generate(prompts, images, num_generations=times)
        return sum(map(len, completions))

    def _ids(self, text: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": text.replace(IMAGE_PLACEHOLDER, "")}]
        chat = [{"role": "user", "content": content}]
        ids: list[int] = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        return ids


def _saved(policy: SparseVLM, folder: Path) -> Path:
    policy.backbone.tokenizer.save_pretrained(folder)
    policy.backbone.image_processor.save_pretrained(folder)
    return folder
