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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.base import Backbone
from vitos.backbones.gemma3 import Gemma3
from vitos.backbones.internvl import InternVL
from vitos.backbones.llava import Llava
from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.backbones.qwen3_vl import Qwen3VL
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
        lambda _, args, kwargs: seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1]),
        with_kwargs=True,
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


def stand_in_tokenizer(
    special: dict[str, str],
    more: Sequence[str],
    template: str,
    added: Sequence[AddedToken] = (),
    extra: dict[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level tokens with a family's special tokens and chat template, for a tokenizer that cannot be had offline.

    Args:
        special: `bos_token` and so on; with a `bos_token` it opens every text, as Llama's.
        more: special tokens without a role.
        added: tokens that the tokenizer lists nowhere else, special or not.
        extra: roles that only the family's processor knows, such as `boi_token`, of tokens in `more`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = list(dict.fromkeys([*special.values(), *more]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=named, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.add_tokens(list(added))
    if bos := special.get("bos_token"):
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bos_id)])
    roles: dict[str, Any] = {"extra_special_tokens": extra} if extra else {"additional_special_tokens": list(more)}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **special)
    fast.chat_template = template
    return fast


def _two_stops(tokenizer: Any, *names: str) -> GenerationConfig:
    return GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(list(names)), pad_token_id=tokenizer.pad_token_id
    )


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


# --- Qwen3-VL -------------------------------------------------------------------------------------------------------


def qwen3_vl(experts: int = 0) -> Qwen3VL:
    """Qwen3-VL but for width and depth: 16-pixel patches, merge 2, interleaved M-RoPE, three deep streams.

    Args:
        experts: that of the mixture (two are asked for each token); 0: dense.
    """
    base = _built(nano)
    ids = {name: getattr(base.model.config, name) for name in dir(base.model.config) if name.endswith("_token_id")}
    vision = {"depth": 5, "hidden_size": 48, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 2, 3]}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config_class = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    model = model_class(
        config_class(
            text_config=text | (mixture if experts else {}),
            vision_config=vision,
            **{name: ids[name] for name in names},
        )
    )
    model.generation_config = copy.deepcopy(base.model.generation_config)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VL(redraw(model, 4), base.tokenizer, processor)


def qwen3_vl_moe() -> Qwen3VL:
    """The same with four experts in every layer, one after the other: their grouped product knows no float64."""
    backbone = qwen3_vl(experts=4)
    backbone.model.set_experts_implementation("eager")
    return backbone


def _qwen3_vl_processor(backbone: Backbone) -> Any:
    make = without_video(Qwen3VLProcessor)
    return make(backbone.image_processor, backbone.tokenizer, chat_template=backbone.tokenizer.chat_template)


# --- LLaVA ----------------------------------------------------------------------------------------------------------

# As LLaVA-1.5's: images first, wherever they stand in the message; the tokenizer opens the text.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As HuatuoGPT-Vision's: role names are ordinary text.
HUATUO_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _llava(text: dict[str, Any], tokenizer: Any, processor: Any, seed: int) -> Llava:
    """CLIP ViT-L/14-336 but for width and depth, with a small language model."""
    width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "num_hidden_layers": 3}
    small = {"vocab_size": 400, "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = LlavaConfig(
        vision_config=vision | width | {"projection_dim": 64},
        text_config=small | width | text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return Llava(redraw(model, seed), tokenizer, processor)


SQUARE_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def llava_1_5() -> Llava:
    """LLaVA-1.5: Llama, the shortest edge resized to 336, the middle cropped."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = stand_in_tokenizer(special, ["<image>"], VICUNA_TEMPLATE)
    return _llava({"model_type": "llama"}, tokenizer, CLIPImageProcessorPil(**SQUARE_336), seed=5)


def huatuo_vision() -> Llava:
    """HuatuoGPT-Vision-7B (2024): Qwen2, the image padded to a square with CLIP's mean colour."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    more = ["<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = stand_in_tokenizer(special, more, HUATUO_TEMPLATE)
    text = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return _llava(text, tokenizer, LlavaImageProcessorPil(**SQUARE_336, do_pad=True), seed=6)


def llava_med() -> Llava:
    """LLaVA-Med v1.5: Mistral, padded to a square."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    template = (
        "{{ bos_token }}{% for message in messages %}[INST] {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} [/INST]{% endfor %}"
    )
    tokenizer = stand_in_tokenizer(special, ["<image>"], template)
    text = {"model_type": "mistral", "sliding_window": None}
    return _llava(text, tokenizer, LlavaImageProcessorPil(**SQUARE_336, do_pad=True), seed=7)


def _llava_processor(backbone: Backbone) -> Any:
    return LlavaProcessor(
        backbone.image_processor,
        backbone.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=backbone.tokenizer.chat_template,
        num_additional_image_tokens=1,
    )


# --- Gemma 3 --------------------------------------------------------------------------------------------------------

GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma3(side: int = 448, sliding_window: int = 1024, do_pan_and_scan: bool | None = None) -> Gemma3:
    """MedGemma but for width, depth and vocabulary, and half its 896 px, which cost 16 times the time.

    So there are 8 x 8 tokens of 4 x 4 patches of 14 px. As there, the tokenizer gives the marks of turns no role and
    has tokens for several line breaks in a row. `test_gemma3.py` runs the full size once.
    """
    extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    turns = [AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")]
    tokenizer = stand_in_tokenizer(
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        list(extra.values()),
        GEMMA3_TEMPLATE,
        added=[*turns, *(AddedToken("\n" * count, normalized=False) for count in (2, 3, 4))],
        extra=extra,
    )
    # Embeddings are scaled by the root of the width: 64, because 8 is exact in any dtype.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"vocab_size": len(tokenizer) + 8, "hidden_size": 64, "intermediate_size": 64} | heads | layers | ends
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    patches = {"image_size": side, "patch_size": 14, "vision_use_head": False}
    config = Gemma3Config(
        text_config=text | {"sliding_window": sliding_window, "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision | patches,
        mm_tokens_per_image=(side // 14 // 4) ** 2,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config = _two_stops(tokenizer, "<eos>", "<end_of_turn>")
    processor = Gemma3ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        resample=2,
        do_pan_and_scan=do_pan_and_scan,
    )
    return Gemma3(redraw(model, 7), tokenizer, processor)


def gemma3_panning() -> Gemma3:
    return gemma3(do_pan_and_scan=True)


def gemma3_processor(backbone: Backbone) -> Any:
    """Told about pan-and-scan in every call: of itself it does not ask its image processor."""
    pan = bool(getattr(backbone.image_processor, "do_pan_and_scan", None))
    given = Gemma3Processor.images_kwargs | {"do_pan_and_scan": pan}
    make = type("Gemma3Processor", (Gemma3Processor,), {"images_kwargs": given})
    return make(
        backbone.image_processor,
        backbone.tokenizer,
        chat_template=backbone.tokenizer.chat_template,
        image_seq_length=backbone.model.config.mm_tokens_per_image,
    )


# --- InternVL -------------------------------------------------------------------------------------------------------

INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(language_model: str = "qwen2", side: int = 224, max_patches: int = 12) -> InternVL:
    """InternVL3 (Qwen2) or InternVL3.5 (Qwen3) but for width, depth and vocabulary, and tiles of half the 448 px.

    So a tile has 8 x 8 tokens of 2 x 2 patches of 14 px. `test_internvl.py` runs the full size once.
    """
    extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra |= {"video_token": "<video>"}
    roles = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    start = AddedToken("<|im_start|>", special=True, normalized=False)
    tokenizer = stand_in_tokenizer(roles, list(extra.values()), INTERNVL_TEMPLATE, added=[start], extra=extra)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8192}
    sizes = {"vocab_size": len(tokenizer) + 8, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = InternVLConfig(
        text_config={"model_type": language_model, "tie_word_embeddings": False} | sizes | heads,
        vision_config=vision | {"image_size": [side, side], "patch_size": [14, 14]},
        image_seq_length=(side // 28) ** 2,
        image_token_id=tokenizer.context_image_token_id,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config = _two_stops(tokenizer, "<|im_end|>", "<|endoftext|>")
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
        crop_to_patches=False,  # as published; the library's processor cuts tiles all the same
        min_patches=1,
        max_patches=max_patches,
    )
    return InternVL(redraw(model, 6), tokenizer, processor)


def internvl3_5() -> InternVL:
    return internvl("qwen3")


def internvl_processor(backbone: Backbone) -> Any:
    return without_video(InternVLProcessor)(
        backbone.image_processor,
        backbone.tokenizer,
        None,
        chat_template=backbone.tokenizer.chat_template,
        image_seq_length=backbone.model.config.image_seq_length,
    )


# --- the table ------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family("qwen2_5_vl", qwen2_5_vl, qwen2_5_vl_processor),
    Family("qwen2_5_vl, nano", nano, qwen2_5_vl_processor),
    Family("qwen2_5_vl, merge 3", windowed, qwen2_5_vl_processor),
    Family("qwen3_vl", qwen3_vl, _qwen3_vl_processor, ((200, 301), (250, 40), (17, 200))),
    Family("qwen3_vl_moe", qwen3_vl_moe, _qwen3_vl_processor, ((200, 301), (250, 40), (17, 200))),
    Family("llava, LLaVA-1.5", llava_1_5, _llava_processor, ((401, 600), (250, 40), (128, 128))),
    Family("llava, HuatuoGPT-Vision", huatuo_vision, _llava_processor, ((401, 600), (250, 41), (17, 200))),
    Family("llava, LLaVA-Med", llava_med, _llava_processor, ((350, 301), (250, 40), (40, 333))),
    Family("gemma3", gemma3, gemma3_processor),
    Family("gemma3, pan-and-scan", gemma3_panning, gemma3_processor, sizes=((600, 301), (299, 310), (258, 800))),
    Family("internvl", internvl, internvl_processor, sizes=((460, 225), (33, 97), (226, 223), (700, 100))),
    Family("internvl, Qwen3", internvl3_5, internvl_processor, sizes=((460, 225), (226, 223), (97, 200))),
)
FAMILIES_BY_NAME = {family.name: family for family in FAMILIES}
