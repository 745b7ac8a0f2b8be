"""The parts of the table of families (`families.py`): its rows, tokenizers, weights, and the independent side.

The independent side is the library's processor and the unmodified model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vitos.backbones.base import Backbone

USUAL_SIZES = ((90, 131), (250, 40), (128, 128), (17, 200))


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: `model_type` of the config, followed by what sets the row apart.
        build: function that makes the backbone; `backbone()` calls it once per test session.
        library_processor: function that makes the library's combined processor from the backbone's parts.
        sizes: width and height of at least three test images of different shape: odd, wide and tall ones. The first
            must be so large that boxes drop more than half of its tokens.
    """

    name: str
    build: Callable[[], Backbone]
    library_processor: Callable[[Backbone], Any]
    sizes: tuple[tuple[int, int], ...] = field(default=USUAL_SIZES, kw_only=True)

    def backbone(self) -> Backbone:
        return built(self.build)

    def processor(self) -> Any:
        return self.library_processor(self.backbone())


BUILT: dict[Callable[[], Backbone], Backbone] = {}
"""What the tests of a session share."""


def built(build: Callable[[], Backbone]) -> Backbone:
    if build not in BUILT:
        BUILT[build] = build()
    return BUILT[build]


def changes() -> list[str]:
    """What tests changed in the models that they share; nothing, if all is well."""
    found = []
    for backbone in BUILT.values():
        model: Any = backbone.model
        if {weight.dtype for weight in model.parameters()} != {torch.float64}:
            found.append(f"{type(model).__name__}: weights are not float64 any more")
        if model.training:
            found.append(f"{type(model).__name__}: left in training mode")
        if getattr(model, "_require_grads_hook", None) is not None:
            found.append(f"{type(model).__name__}: left with the hook of gradient checkpointing")
    return found


def library_inputs(processor: Any, text: str, images: Sequence[Image.Image], extra_ids: Sequence[int] = ()) -> Any:
    """Inputs of the unmodified model for a chat with images, made by the library's processor, as a batch of one.

    Args:
        processor: the library's combined processor.
        text: user message with one `<image>` per image.
        images: the images.
        extra_ids: token ids to put behind the chat, such as the tokens of an answer.
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
    """Logits (T, vocab) of the unmodified model, and the position ids (axes, T) that reach its rotary embedding."""
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
    """The class of a combined processor without its video processor, which would require torchvision."""
    return type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda *_: None})


def redraw(model: Any, seed: int) -> Any:
    """The model with large random weights in float64."""
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
    """A byte-level tokenizer with a family's special tokens and chat template, where the real one is not available.

    Args:
        special: tokens by role, such as `bos_token`, which then begins every text, as in Llama's tokenizer.
        more: special tokens without a role.
        template: the chat template.
        added: further tokens, special or not, that `all_special_tokens` does not list.
        extra: roles that only the family's processor uses, such as `boi_token`, for tokens in `more`.
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


def two_stops(tokenizer: Any, *names: str) -> GenerationConfig:
    return GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(list(names)), pad_token_id=tokenizer.pad_token_id
    )
