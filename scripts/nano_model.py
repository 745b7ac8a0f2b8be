"""`nano`, untrained: a Qwen2.5-VL of 1.6 million parameters with a small tokenizer.

Its weights come from `scripts/make_nano.py`. Numbers 0.00 … 1.00 and every word of the phantoms are one token each,
so that a box is eleven tokens and an answer ten.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitos.backbones.qwen2_5_vl import Qwen25VL
from vitos.data.phantom import samples
from vitos.policy.spec import VitosSpec

PATCH, MERGE = 8, 2
ROTARY_BASE = 10_000.0
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<evidence>", "</evidence>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NANO_SPEC = VitosSpec(
    localize_prompt="{question}\nLocate the evidence, then answer.",
    reason_prompt="{question}\nAnswer.",
    answer_with="text",  # binding options to letters costs such a small model more than all the rest (docs/nano.md)
)
# Plain words of medical questions, so that real data sets do not fall apart into single letters.
WORDS = (
    "user assistant system Locate the evidence, then answer. Answer. List all findings. What is shown? Which option "
    "says it? it is a there are none image of in which kind blood cell centred near point fractions width and height "
    "measured from top left right corner red white platelet quadrant centre lie upper lower how many annotated "
    "platelets cell nuclei does this microscope show nucleus nuclei inside region contrast enhanced MR head tumour "
    "meningioma glioma pituitary displayed about much whole area bounding box cover less than more to window yes no "
    "densest largest mask stated scan chest x-ray CT slice organ lesion side"
)


def build_tokenizer(corpus: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a model's own text; numbers with two decimals and tags are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d\.\d\d| ?[A-Za-z]+|\[\[|\]\]|, | ?\d|\n|[^\sA-Za-z\d]| ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_as_text(tokenizer, TAGS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_nano(seed: int = 0) -> Qwen25VL:
    """The untrained model with tokenizer and image processor.

    Four starting values decide whether such a small model learns to look, localise and answer in minutes:

    - An initial scale of 0.08: the library's 0.02 is made for wide models.
    - Two of the first layer's four heads start as previous-token heads: they look one and two tokens back, by the
      biases of their queries and keys in the four fastest rotary pairs. What comes before a word is then a copy.
      With all four heads so, naming and boxes were learned later than without.
    - Embeddings of the numbers 0.00 … 1.00 are smooth in the number, so that neighbours share what they learn.
    - Vision: query and key biases drawn with std 2, so that attention depends on position from the start.

    The rotary base stays the library's 10,000. A small base (10) makes rows and columns easier to read off the
    positions, but leaves no slow rotary pair: attention can no longer match content at any distance, and names stay
    at chance. The encoder writes row and column into its tokens instead (`scripts/make_nano.py`).
    """
    tokenizer = build_tokenizer(_corpus())
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL}
    width, vision_width, depth = 128, 96, 4
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": 3 * vision_width,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 8 * PATCH * MERGE,
            "fullatt_block_indexes": list(range(depth)),
            "out_hidden_size": width,
            "initializer_range": 0.08,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    _scatter_vision(model)
    structured_start(model, [tokenizer.get_vocab()[f"{i / 100:.2f}"] for i in range(101)])
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    side = PATCH * MERGE
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": (2 * side) ** 2, "longest_edge": (16 * side) ** 2},
        image_mean=[0.3] * 3,
        image_std=[0.25] * 3,
    )
    return Qwen25VL(model, tokenizer, processor)


def _as_text(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The same ids, but `tokens` are not special: decoding an answer without special tokens keeps its tags."""
    data = json.loads(tokenizer.to_str())
    for added in data["added_tokens"]:
        added["special"] = added["content"] not in tokens
    return Tokenizer.from_str(json.dumps(data))


@torch.no_grad()
def _scatter_vision(model: Qwen2_5_VLForConditionalGeneration) -> None:
    for name, parameter in model.model.visual.named_parameters():
        if name.endswith("qkv.bias"):  # queries, keys, values in one
            parameter[: 2 * len(parameter) // 3].normal_(0, 2)


@torch.no_grad()
def structured_start(model: Any, number_ids: list[int]) -> None:
    """Look-back heads and number embeddings as `build_nano` says; random numbers from torch's global generator.

    Args:
        model: a model whose language model has two query heads per key-value head, biases and tied embeddings.
        number_ids: token ids of the numbers 0.00 … 1.00.
    """
    _look_back(model.model.language_model.layers[0].self_attn)
    table = model.lm_head.weight  # tied to the input embeddings
    width = int(table.shape[1])
    cycles = 0.5 * 16 ** torch.rand(width)  # 0.5 to 8 over the range of the numbers
    phase = 2 * torch.pi * torch.rand(width)
    values = torch.linspace(0, 1, len(number_ids))[:, None]
    table[number_ids] = 0.08 * 2**0.5 * torch.cos(2 * torch.pi * cycles * values + phase)


def _look_back(attention: Any, strength: float = 5.0, pairs: int = 4) -> None:
    """Let the heads of the first key-value head look back: head h, h + 1 tokens.

    A query and a key that are constant in rotary pair i, the query's turned back by d steps, have the product
    strength² · cos(ω_i (distance − d)): greatest at distance d.
    """
    half = attention.head_dim // 2
    speeds = ROTARY_BASE ** (-torch.arange(pairs) / half)
    attention.k_proj.bias[:pairs] = strength
    queries = attention.q_proj.bias.view(-1, 2 * half)[: attention.num_key_value_groups]
    for head, query in enumerate(queries):
        angle = speeds * (head + 1)
        query[:pairs] = strength * angle.cos()
        query[half : half + pairs] = -strength * angle.sin()


def _corpus() -> Iterable[str]:
    for hundredth in range(101):
        yield from [f"{hundredth / 100:.2f}"] * 200
    for _, _, question in samples("val", 200):
        yield f"{question.full_text}\n{question.thought}"
    for word in WORDS.split():
        yield from [word] * 20
        yield from [" " + word] * 20
    for piece in ("[[", "]]", ", ", "], [", " findings", " finding", *(f"{letter}." for letter in "ABCD")):
        yield from [piece] * 50
