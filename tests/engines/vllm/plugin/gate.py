"""The cases on which vLLM must agree with our torch engine, the models for them, and the torch engine's results.

This file is the reference and runs without vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.backbones.family import built
from tests.backbones.family_internvl import internvl
from tests.backbones.family_llava import huatuo_vision, llava_1_5
from tests.backbones.family_qwen import nano, qwen3_vl
from torch import Tensor

from vitos.backbones import Backbone, load_backbone
from vitos.core.prompt import Prompt, pad_prompts
from vitos.core.sparsify import Fusion
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.plugin.request import NOT_FUSED

TOKENS = 24
"""Number of greedy tokens per case."""

LANDSCAPE, PORTRAIT, SQUARE = (224, 140), (140, 224), (112, 112)
"""Width and height: 5 x 8, 8 x 5 and 4 x 4 visual tokens of 28 x 28 pixels."""

Keep = tuple[str, float, float, float, float] | tuple[str, float, int] | None
"""("box", top, left, bottom, right) or ("random", share, seed), in shares of the grid; None sends no list."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request: pictures as (seed, width, height), and the tokens that are kept of each."""

    name: str
    pictures: tuple[tuple[int, int, int], ...]
    keep: tuple[Keep, ...]
    text: str = "<image>What is it?"
    fusion: Fusion = NOT_FUSED

    @property
    def images(self) -> list[Image.Image]:
        return [picture(*each) for each in self.pictures]

    def kept(self, grids: Sequence[tuple[int, int]]) -> list[list[int] | None]:
        """Indices of the kept tokens of each image, given (rows, columns) of its grid."""
        return [_indices(keep, *grid) for keep, grid in zip(self.keep, grids, strict=True)]


TWO = "<image><image>Compare."
CASES = (
    Case("landscape, box", ((0, *LANDSCAPE),), (("box", 0.2, 0.25, 0.8, 0.75),)),
    Case("landscape, random", ((0, *LANDSCAPE),), (("random", 0.4, 1),)),
    Case("portrait, box without the bottom rows", ((1, *PORTRAIT),), (("box", 0, 0.2, 0.4, 0.8),)),
    Case("portrait, random", ((1, *PORTRAIT),), (("random", 0.3, 2),)),
    Case("one token", ((1, *PORTRAIT),), (("random", 0.001, 17),)),
    Case("whole", ((2, *SQUARE),), (None,)),
    Case("all in a list", ((2, *SQUARE),), (("box", 0, 0, 1, 1),)),
    Case("two images", ((0, *LANDSCAPE), (1, *PORTRAIT)), (("random", 0.3, 3), ("random", 0.5, 4)), TWO),
    Case("two images swapped", ((1, *PORTRAIT), (0, *LANDSCAPE)), (("random", 0.3, 3), ("random", 0.5, 4)), TWO),
    Case("first whole, second pruned", ((0, *LANDSCAPE), (2, *SQUARE)), (None, ("random", 0.5, 5)), TWO),
    Case("one image twice", ((0, *LANDSCAPE), (0, *LANDSCAPE)), (None, ("box", 0, 0, 0.4, 0.25)), TWO),
    # Dropped tokens fused into the kept ones, as in the default spec.
    Case("box, weighted fusion", ((0, *LANDSCAPE),), (("box", 0.2, 0.25, 0.8, 0.75),), fusion=Fusion()),
    Case("random, mean fusion", ((1, *PORTRAIT),), (("random", 0.3, 6),), fusion=Fusion("mean")),
)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured blobs."""
    rng = np.random.default_rng(seed)
    small = (rng.random((height // 14, width // 14, 3)) * 255).astype("uint8")
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _indices(keep: Keep, rows: int, columns: int) -> list[int] | None:
    if keep is None:
        return None
    if keep[0] == "random":
        _, share, seed = keep
        rng = np.random.default_rng(int(seed))
        count = max(1, int(rows * columns * float(share)))
        return sorted(rng.choice(rows * columns, count, replace=False).tolist())
    _, top, left, bottom, right = (float(x) if i else x for i, x in enumerate(keep))
    ys, xs = range(round(top * rows), round(bottom * rows)), range(round(left * columns), round(right * columns))
    return [y * columns + x for y in ys for x in xs]


# --- models ---------------------------------------------------------------------------------------------------------


def _qwen2_5_vl(tied: bool) -> Backbone:
    """A tiny Qwen2.5-VL with windowed vision attention, and heads of 32, the smallest of vLLM's CPU attention."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    base = built(nano)
    config = copy.deepcopy(base.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    for name, value in (text | {"num_key_value_heads": 2, "rope_parameters": rope}).items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * 3
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 128}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1]}
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(base.model.generation_config)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=limits)
    return type(base)(_drawn(model), base.tokenizer, processor)


def _wider(small: Backbone, **text: Any) -> Backbone:
    """A tiny model with heads of 32, the smallest of vLLM's CPU attention."""
    config = copy.deepcopy(small.model.config)
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    for name, value in (shape | text).items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    model = type(small.model)(config)
    model.generation_config = small.model.generation_config
    return type(small)(_drawn(model), small.tokenizer, small.image_processor)


def _qwen3_vl() -> Backbone:
    """A tiny Qwen3-VL with three extra visual streams."""
    small = copy.copy(qwen3_vl())
    small.model.config.vision_config.out_hidden_size = 128
    small.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 280 * 280}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    return _wider(small, rope_parameters=rope, vocab_size=small.model.config.text_config.vocab_size)


def _drawn(model: Any) -> Any:
    """The model with weights of N(0, 0.15): with smaller ones it repeats one token, which proves nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or name.endswith("bias"):
                weight.copy_(
                    torch.empty_like(weight).normal_(0, 0.15 if weight.ndim > 1 else 0.05, generator=generator)
                )
    return model.float().eval()


MODELS = {
    "qwen2_5_vl, tied": lambda: _qwen2_5_vl(tied=True),
    "qwen2_5_vl, untied": lambda: _qwen2_5_vl(tied=False),
    "qwen3_vl": _qwen3_vl,
    "internvl": lambda: _wider(internvl(side=112, max_patches=2)),
    "llava, llama, cropped": lambda: _wider(llava_1_5()),
    "llava, qwen2, padded": lambda: _wider(huatuo_vision()),
}


def write_model(name: str, folder: Path) -> Backbone:
    """Save one of `MODELS` and load it as a user would."""
    backbone = MODELS[name]()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    backbone.image_processor.save_pretrained(folder)
    return load_backbone(folder, dtype="float32")


# --- what the torch engine says -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """Greedy completion of a prompt, and the log-probabilities of the prompt's tokens after the first."""

    prompt: Prompt
    keep: list[list[int] | None]
    token_ids: list[int]
    logprobs: Tensor
    prompt_logprobs: Tensor


@torch.no_grad()
def torch_says(backbone: Backbone, case: Case) -> Said:
    visuals = [backbone.encode([image])[0] for image in case.images]
    keep = case.kept([(v.grid.views[0].rows, v.grid.views[0].cols) for v in visuals])
    masks = []
    for visual, kept in zip(visuals, keep, strict=True):
        mask = torch.zeros(visual.grid.num_tokens, dtype=torch.bool)
        mask[slice(None) if kept is None else kept] = True
        masks.append(mask)
    prompt = backbone.build_prompt(case.text, visuals).sparse(masks, case.fusion)
    ((completion,),) = TorchEngine(backbone).sample([prompt], Sampling(TOKENS), [[0]])
    return Said(prompt, keep, completion.token_ids.tolist(), completion.logprobs, prompt_logprobs(backbone, prompt))


@torch.no_grad()
def prompt_logprobs(backbone: Backbone, prompt: Prompt) -> Tensor:
    """Log-probabilities of the prompt's tokens after the first, without bans, shape (T - 1,)."""
    logits = backbone.model(**backbone.model_inputs(pad_prompts([prompt], 0)), use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, prompt.input_ids[1:, None])[:, 0]


def chat_text(backbone: Backbone, case: Case) -> str:
    """The prompt as text, with one marker per image."""
    content = [{"type": "image"}] * len(case.pictures) + [{"type": "text", "text": case.text.replace("<image>", "")}]
    text: str = backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text
