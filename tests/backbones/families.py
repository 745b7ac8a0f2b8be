"""The table of model families: for each a tiny random model of the true architecture, and how the library runs it.

A new family is one row in `FAMILIES`; `test_invariants.py` does the rest. The image processor has the settings of the
published checkpoints (a row says where size forces another), the weights are large (N(0, 0.15)), so that a wrong
position or a lost token changes logits visibly and greedy text is no constant, and float64 keeps "equal" and "nearly
equal" apart.

`library_inputs` and `library_run` are the independent side: the family's own processor makes text and pixels, and the
unmodified model computes placeholders, visual tokens and positions itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.base import Backbone
from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.nano.build import build_nano

USUAL_SIZES = ((90, 131), (250, 40), (128, 128), (17, 200))


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: `model_type` of the config, then what this row has of its own.
        build: makes the backbone (once per test session: use `backbone()`).
        library_processor: the library's combined processor around the backbone's image processor and tokenizer.
        sizes: width and height of test images, at least three, all unlike: odd, wide and tall ones among them. The
            first must be large enough that boxes drop more than half of its tokens.
    """

    name: str
    build: Callable[[], Backbone]
    library_processor: Callable[[Backbone], Any]
    sizes: tuple[tuple[int, int], ...] = USUAL_SIZES

    def backbone(self) -> Backbone:
        return _built(self.build)

    def processor(self) -> Any:
        return self.library_processor(self.backbone())


@functools.cache
def _built(build: Callable[[], Backbone]) -> Backbone:
    return build()


# --- the library's side ---------------------------------------------------------------------------------------------


def library_inputs(processor: Any, text: str, images: Sequence[Image.Image], extra_ids: Sequence[int] = ()) -> Any:
    """What the family's own processor makes of a chat with images: inputs of the unmodified model, batch of one.

    Args:
        text: user message with one `<image>` for each image.
        extra_ids: token ids behind the chat, such as the tokens of an answer.
    """
    content: list[dict[str, str]] = []
    for index, piece in enumerate(text.split("<image>")):
        content += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * bool(piece)
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    inputs = dict(
        processor(
            text=[chat],
            images=list(images) or None,
            return_tensors="pt",
            add_special_tokens=not (bos and chat.startswith(bos)),  # as the library's own apply_chat_template does
        )
    )
    length = inputs["input_ids"].shape[1]
    extra = torch.tensor([list(extra_ids)], dtype=torch.long)
    for name, value in inputs.items():
        if value.shape == (1, length):
            ends = {"input_ids": extra, "attention_mask": torch.ones_like(extra)}
            inputs[name] = torch.cat([value, ends.get(name, torch.zeros_like(extra)).to(value.dtype)], dim=1)
    return inputs


@torch.no_grad()
def library_run(backbone: Backbone, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (T, vocab) of the unmodified model, and the position ids (axes, T) that its rotary embedding got."""
    seen: list[Tensor] = []
    rotary = backbone.model.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    try:
        logits = backbone.model(**inputs).logits[0]
    finally:
        hook.remove()
    positions = seen[0]
    return logits, (positions[:, 0] if positions.ndim == 3 else positions)


def without_video(processor_class: Any) -> Any:
    """A combined processor that does without its video processor, which would insist on torchvision."""
    return type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda *_: None})


def redraw(model: Any, seed: int) -> Any:
    """The model with large random weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale, centre = (0.15, 0.0) if weight.ndim > 1 or "bias" in name else (0.3, 1.0)
            weight.copy_(torch.empty_like(weight).normal_(centre, scale, generator=generator))
    return model.double().eval()


# --- Qwen2.5-VL -----------------------------------------------------------------------------------------------------


def nano() -> Qwen25VL:
    """The shape of `nano`: tied embeddings, full attention in every vision block, 8-pixel patches, merge 2."""
    backbone = build_nano()
    redraw(backbone.model, 1)
    return backbone


def _qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], limits: tuple[int, int], seed: int) -> Qwen25VL:
    """A model with the tokenizer of nano and untied embeddings of 800 logits, more than it has tokens."""
    base = _built(nano)
    config = copy.deepcopy(base.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    for name, value in ({"vocab_size": 800, "num_hidden_layers": 3} | text).items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = config.text_config.layer_types[:3]
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(base.model.generation_config)
    model.generation_config.eos_token_id = [2, 0]  # two stop tokens, as Qwen2.5-VL has
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        size={"shortest_edge": limits[0], "longest_edge": limits[1]},
    )
    return Qwen25VL(redraw(model, seed), base.tokenizer, processor)


def windowed() -> Qwen25VL:
    """An unusual shape: windowed vision attention, 4-pixel patches, merge 3."""
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    text = {"hidden_size": 48, "intermediate_size": 64, "rope_parameters": rope} | heads
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    patches = {"patch_size": 4, "spatial_merge_size": 3, "window_size": 24, "fullatt_block_indexes": [1]}
    return _qwen2_5_vl(text, vision | patches, (24**2, 96**2), seed=2)


def qwen2_5_vl() -> Qwen25VL:
    """The vision of Qwen2.5-VL-7B but for width and depth: 14-pixel patches, merge 2, windows of 112, true limits."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": rope} | heads
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64}
    patches = {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    return _qwen2_5_vl(text, vision | patches, (3136, 12845056), seed=3)


def qwen2_5_vl_processor(backbone: Backbone) -> Any:
    make = without_video(Qwen2_5_VLProcessor)
    return make(backbone.image_processor, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template)


# --- the table ------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family("qwen2_5_vl", qwen2_5_vl, qwen2_5_vl_processor),
    Family("qwen2_5_vl, nano", nano, qwen2_5_vl_processor),
    Family("qwen2_5_vl, merge 3", windowed, qwen2_5_vl_processor),
)
FAMILIES_BY_NAME = {family.name: family for family in FAMILIES}
