"""The class `Backbone`: what a model family defines, and what all families share.

A family is one file with one subclass. It says how pixels are prepared, what the visual tokens are and which part of
the image each one covers, which positions they take, how they are passed to the Hugging Face model, and which numbers
the family writes for a box. No other file of the package knows a family; docs/backbone.md says how to add one.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitos.backbones.attention import Attention
from vitos.backbones.evidence_head import EvidenceHead
from vitos.core.geometry import Box, Rect, TokenGrid, into_crop, out_of_crop
from vitos.core.prompt import Prompt, PromptBatch, VisualTokens
from vitos.core.record import IMAGE_PLACEHOLDER

CoordinateStyle = Literal["normalized", "absolute", "per_mille"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a family can do. A request for anything else is refused with the family's name.

    Attributes:
        several_images: whether a prompt may have more than one image.
        extra_streams: whether visual features also enter early layers (DeepStack); they are pruned by the same mask.
        native_coordinates: the convention in which the family was trained to write boxes.
        bidirectional_views: whether the visual tokens of one view attend to one another in both directions.
        any_resolution: whether the encoder takes images of any size, in steps of one visual token, so that an image
            can be encoded coarsely and in parts (`layout`, `encode_reduced`, `encode_cells`).
    """

    several_images: bool
    extra_streams: bool
    native_coordinates: CoordinateStyle
    bidirectional_views: bool = False
    any_resolution: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionGeometry:
    """Everything that decides which pixel goes into which visual token; saved with a checkpoint, checked at load.

    Attributes:
        patch_size: side of a patch of the vision encoder, in pixels.
        merge_size: side of a visual token, in patches.
        min_pixels: smallest area of the image that the encoder sees, in pixels.
        max_pixels: largest area; equal to `min_pixels` for an encoder of fixed size.
        rules: further settings of the image processor, such as padding, under names that the family chooses.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    rules: Mapping[str, int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VllmModel:
    """How vLLM finds the class that runs a family with part of its visual tokens; nothing is imported here.

    Attributes:
        architecture: name that vLLM knows the class by, for `hf_overrides={"architectures": [...]}`.
        model: the class, as "module:Class".
        config: a vLLM `VerifyAndUpdateConfig` that changes the model's config first, as "module:Class"; empty if
            none is needed.
        model_types: the `model_type`s of the family that the class runs; empty: all.
    """

    architecture: str
    model: str
    config: str = ""
    model_types: tuple[str, ...] = ()

    def runs(self, model_type: str) -> bool:
        """Whether the class runs this `model_type` of its family."""
        return not self.model_types or model_type in self.model_types


class Backbone(ABC):
    """One loaded model with its tokenizer and image processor.

    Attributes:
        model_types: the `model_type`s of the Hugging Face configs that the family loads; each belongs to one family.
            They are not inherited: a class that names none is a base for others, not a family.
        capabilities: what the family can do.
        vllm_model: the class that vLLM runs it with; None if vLLM cannot run it.
        model: the unmodified Hugging Face model.
        tokenizer: its tokenizer, with a chat template.
        image_processor: its PIL image processor.
        companions: content of the other small files of the checkpoint, by name.
        evidence_head: scores of visual tokens, for the plans one_pass and glance; None if the checkpoint has none.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[Capabilities]
    vllm_model: ClassVar[VllmModel | None] = None

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.companions: Mapping[str, bytes] = {}
        self.evidence_head: EvidenceHead | None = None

    # --- what a family defines --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def geometry(self) -> VisionGeometry:
        """The geometry that the loaded image processor and encoder have."""

    @property
    @abstractmethod
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        """Encoder and merger: frozen during RL, so that their output is computed once per image."""

    @abstractmethod
    def encode(self, images: Sequence[Image.Image]) -> list[VisualTokens]:
        """Visual tokens of each RGB image; differentiable if gradients are enabled."""

    @classmethod
    @abstractmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        """Number of visual tokens of the largest image, from a configuration alone; for estimates of memory.

        Args:
            config: the Hugging Face config of the whole model.
            max_pixels: largest area of the resized image in pixels; None for the library's limit. It has no effect
                on a family with images of fixed size.
        """

    # --- what most families leave as it is --------------------------------------------------------------------------

    @property
    def visual_token(self) -> str:
        """The text of the placeholder of one visual token."""
        return str(self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id))

    @property
    def language_model(self) -> Any:
        """The decoder, which has `layers`, `norm` and `config`."""
        return self.model.model.language_model

    @property
    def image_marker(self) -> str:
        """The text that the chat template writes for an image."""
        return self.visual_token

    def image_text(self, visual: VisualTokens) -> str:
        """The text that replaces the marker, as in the family's processor: one placeholder per visual token."""
        return self.visual_token * visual.grid.num_tokens

    def position_ids(self, is_visual: Tensor, visuals: Sequence[VisualTokens]) -> Tensor:
        """Position ids of the dense prompt, shape (axes, T).

        Args:
            is_visual: True at the placeholders of visual tokens, bool, shape (T,).
            visuals: the visual tokens of each image, in the order of the prompt.
        """
        return torch.arange(len(is_visual), device=is_visual.device)[None]

    def encoder_attention(self, image: Image.Image, depth: float = 1.0) -> Attention:
        """Attention that each visual token of an RGB image receives in a layer of the encoder, and its keys.

        Args:
            depth: place of the layer among those that the visual tokens are made by, in (0, 1]; 1 is the last.

        Raises:
            ValueError: for a family that does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} does not say which encoder attention its visual tokens receive; use another "
            "selector, or define `encoder_attention`"
        )

    def model_inputs(self, batch: PromptBatch) -> dict[str, Any]:
        """Keyword arguments for the model's `forward` that run a padded batch of prompts."""
        positions = batch.position_ids  # (axes, B, T); a model with one axis takes (B, T)
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": positions if len(positions) > 1 else positions[0],
        }
        if len(batch.embeddings):
            inputs["mm_encoder_outputs"] = {"image": self.encoder_output(batch)}
        return inputs

    def layout(self, image: Image.Image) -> tuple[TokenGrid, tuple[int, int]]:
        """The grid, and the resized width and height, that `encode` would give an image; needs `any_resolution`."""
        raise self._one_resolution()

    def encode_reduced(self, image: Image.Image) -> VisualTokens:
        """Visual tokens of an RGB image at half its width and height: at most a quarter of the tokens, at least 1."""
        raise self._one_resolution()

    def encode_cells(self, image: Image.Image, rectangles: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, ...]:
        """Visual tokens of parts of an image at full resolution, each part encoded alone.

        Args:
            image: the whole RGB image.
            rectangles: the parts, in cells of the image's grid: top, left, bottom, right, ends not included.

        Returns:
            The embeddings and any extra streams, each (n, hidden), rectangle by rectangle, row by row.
        """
        raise self._one_resolution()

    def _one_resolution(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} encodes every image at one resolution, not coarsely or in parts; use another plan"
        )

    def encoder_output(self, batch: PromptBatch) -> Any:
        """The batch's visual tokens in the form in which the model's own encoder returns them."""
        features: Any = batch.embeddings[None]  # (1, V, hidden): as if all were tokens of one image
        return BaseModelOutputWithPooling(pooler_output=features)

    # --- what follows from it ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def vision_dtype(self) -> torch.dtype:
        """Number format of the vision encoder's weights."""
        dtype: torch.dtype = next(p.dtype for module in self.vision_modules for p in module.parameters())
        return dtype

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    @cached_property
    def visual_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.visual_token))

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the generation config and the tokenizer's end of sequence."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({int(i) for i in (*listed, self.tokenizer.eos_token_id) if i is not None}))

    @cached_property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Special tokens that must never be sampled, above all image placeholders; stop tokens are not among them."""
        special = {*self.tokenizer.convert_tokens_to_ids(list(self._special_tokens)), self.visual_token_id}
        return tuple(sorted(special - set(self.stop_token_ids)))

    @property
    def cache_refusal(self) -> str:
        """The reason why no entries can be picked from the model's KV cache; empty if they can be.

        With sliding-window attention the cache holds the last tokens only, and counts its own slots, not positions.
        """
        kinds = layer_kinds(self.model.config.get_text_config())
        if others := ", ".join(sorted(kinds - {"full_attention"})):
            return (
                f"{type(self).__name__} has layers of {others}, whose cache does not hold every token, so that none "
                "can be gathered from it; use plan two_pass, dense or crop"
            )
        return ""

    def build_prompt(self, text: str, visuals: Sequence[VisualTokens]) -> Prompt:
        """The dense prompt of one user message.

        Args:
            text: the message, with one `<image>` per image. Special tokens in it are escaped.
            visuals: the visual tokens of each image, in the order of the placeholders.

        Raises:
            ValueError: if the numbers of placeholders and images differ, or the family takes one image only.
        """
        pieces = text.split(IMAGE_PLACEHOLDER)
        if len(pieces) - 1 != len(visuals):
            raise ValueError(f"the text has {len(pieces) - 1} {IMAGE_PLACEHOLDER} for {len(visuals)} images: {text!r}")
        if len(visuals) > 1 and not self.capabilities.several_images:
            raise ValueError(f"{type(self).__name__} takes one image in a prompt, got {len(visuals)}")
        content: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            if index > 0:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": self.escape(piece)})
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # Inserted into the text, not among the ids: line breaks of text and template may be one token.
        pieces = chat.split(self.image_marker)
        if len(pieces) - 1 != len(visuals):
            raise ValueError(
                f"the chat template writes {self.image_marker} {len(pieces) - 1} times for {len(visuals)} images"
            )
        chat = pieces[0] + "".join(self.image_text(v) + p for v, p in zip(visuals, pieces[1:], strict=True))
        # A Llama tokenizer begins every text with its first token, unless the chat template has already written it.
        opened = bool(self.tokenizer.bos_token) and chat.startswith(self.tokenizer.bos_token)
        input_ids = torch.tensor(self.tokenizer(chat, add_special_tokens=not opened)["input_ids"], device=self.device)
        self.check_room(len(input_ids), 0)
        is_visual = input_ids == self.visual_token_id  # (T,)
        empty = torch.zeros(0, self.model.config.get_text_config().hidden_size, device=self.device)
        positions = self.position_ids(is_visual, visuals)  # (axes, T)
        return Prompt(
            input_ids=input_ids,
            position_ids=positions,
            is_visual=is_visual,
            embeddings=torch.cat([v.embeddings for v in visuals]) if visuals else empty,
            next_position=int(positions.max()) + 1,
            streams=tuple(torch.cat(parts) for parts in zip(*(v.streams for v in visuals), strict=True)),
        )

    @property
    def context_length(self) -> int | None:
        """Largest number of tokens that prompt and answer may have together; None if the config names none."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if length is None else int(length)

    def check_room(self, tokens: int, more: int) -> None:
        """Refuse a prompt that is too long for the model.

        Args:
            tokens: number of tokens of the prompt, visual ones included.
            more: largest number of tokens that may be written behind it.

        Raises:
            ValueError: if they do not fit; it names both numbers.
        """
        context = self.context_length
        if context is not None and tokens + more > context:
            answer = f" and an answer of up to {more}" if more else ""
            raise ValueError(
                f"the prompt has {tokens} tokens{answer}, but the model's context is {context}: shorten the question, "
                "use smaller or fewer images, or allow a shorter answer"
            )

    def escape(self, text: str) -> str:
        """The text without special tokens: each one gets a space after its first character."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    @cached_property
    def _special_tokens(self) -> set[str]:
        """Tokens with a role, and tokens that are only marked as special, such as Gemma's `<start_of_turn>`."""
        marked = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return marked | set(self.tokenizer.all_special_tokens)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        names = {*self._special_tokens, self.visual_token, self.image_marker}
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in longest_first))

    # --- coordinates ------------------------------------------------------------------------------------------------

    def write_box(self, box: Box, visual: VisualTokens, style: CoordinateStyle) -> list[str]:
        """The four numbers of a box as the model writes them: two decimals, whole pixels, or per mille.

        The numbers refer to the picture that the model sees; if the image was cropped, to the crop. A box whose two
        sides would be written as the same number is written one unit wide instead, from its first side.

        Args:
            box: in fractions of the original image.
            visual: the visual tokens of that image.
            style: the convention for the numbers.

        Raises:
            ValueError: if no part of the box lies in that picture.
        """
        box = into_crop(box, visual.grid.shown)
        units = (100, 100, 100, 100) if style == "normalized" else _scales(visual, style)
        x1, y1, x2, y2 = (round(value * unit) for value, unit in zip(box.as_tuple(), units, strict=True))
        if x1 == x2:
            x1 = min(math.floor(box.x1 * units[0]), units[0] - 1)
            x2 = x1 + 1
        if y1 == y2:
            y1 = min(math.floor(box.y1 * units[1]), units[1] - 1)
            y2 = y1 + 1
        return [f"{value / 100:.2f}" if style == "normalized" else str(value) for value in (x1, y1, x2, y2)]

    def box_reader(
        self, visual: VisualTokens, style: CoordinateStyle
    ) -> Callable[[tuple[float, float, float, float]], Box | None]:
        """The inverse of `write_box`: a function from four written numbers to a box of the original image.

        It returns None for numbers that are not a valid box.
        """

        def read(numbers: tuple[float, float, float, float]) -> Box | None:
            try:
                seen = (number / scale for number, scale in zip(numbers, _scales(visual, style), strict=True))
                return out_of_crop(Rect(*seen), visual.grid.shown)
            except ValueError:
                return None

        return read


def _scales(visual: VisualTokens, style: CoordinateStyle) -> tuple[int, int, int, int]:
    """Units per width or height of the image, for x1, y1, x2 and y2."""
    if style == "normalized":
        return (1, 1, 1, 1)
    width, height = (1000, 1000) if style == "per_mille" else visual.resized
    return (width, height, width, height)


def layer_kinds(config: Any) -> set[str]:
    """The kinds of attention layers in a text config, by the library's names."""
    window = getattr(config, "sliding_window", None)
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
