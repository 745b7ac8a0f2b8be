"""What the sparse models of all families share: mix-ins for vLLM's classes of processing info, processor and model.

There are two kinds of requests:

- Pixels with our option (`request.py`): the placeholder expands to the kept tokens, the encoder sees the whole image,
  and its rows are selected (and fused) afterwards. This works offline, and as `mm_processor_kwargs` through vLLM's
  OpenAI server.
- Visual tokens and positions that were computed elsewhere (`prompts.py`): what training sends. No encoder runs.

vLLM's caches tell images apart by a hash of the image together with its entry of the option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from vitos.core.sparsify import fuse
from vitos.engines.vllm.plugin.images import EncodedImages, content_key
from vitos.engines.vllm.plugin.positions import as_given, with_gaps
from vitos.engines.vllm.plugin.request import (
    EMBEDDINGS,
    FUSION,
    KEY,
    MASK,
    OPTION,
    POSITIONS,
    fusion_of,
    image_options,
    without_option,
)

CACHED_IMAGES = 8
"""Number of images whose visual tokens are kept; `additional_config={"vitos": {"cached_images": N}}` changes it."""


class SparseInfoMixin:
    """For a family's processing info."""

    ctx: Any

    def get_hf_processor(self, **options: Any) -> Any:
        """The family's processor with the PIL image processor, for the pixels of training and evaluation."""
        processor = super().get_hf_processor(**without_option(options))  # type: ignore[misc]
        if not isinstance(processor.image_processor, PilBackend):
            config = self.ctx.model_config
            processor.image_processor = AutoImageProcessor.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=config.trust_remote_code, backend="pil"
            )
        return processor


class SparseProcessorMixin:
    """For a family's multimodal processor."""

    info: Any

    def whole_tokens(self, inputs: Mapping[str, Any]) -> list[int]:
        """Number of visual tokens of each image in the Hugging Face processor's output, before any is dropped."""
        raise NotImplementedError

    def contents(self, inputs: Mapping[str, Any]) -> Sequence[tuple[Tensor, ...]]:
        """The tensors that determine the encoder's output, for each image in the processor's output."""
        raise NotImplementedError

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        out = super()._apply_hf_processor_main(mm_items, without_option(hf_kwargs))  # type: ignore[misc]
        if "pixel_values" not in out:
            if (hf_kwargs.get(OPTION) or {}).get("keep"):  # empty if all images were found in a cache
                raise ValueError(f"{OPTION}.keep needs images as pixels, not as embeddings")
            return out
        sizes = self.whole_tokens(out)
        options = image_options(hf_kwargs, len(sizes))
        out[MASK] = torch.cat([option.mask(size) for option, size in zip(options, sizes, strict=True)])
        out[FUSION] = torch.tensor([option.fusion_row for option in options], dtype=torch.float64)
        out[KEY] = torch.stack([content_key(*parts) for parts in self.contents(out)])
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        sizes = torch.tensor(self.whole_tokens(hf_inputs) if "pixel_values" in hf_inputs else [], dtype=torch.long)
        fields[MASK] = MultiModalFieldConfig.flat_from_sizes("image", sizes, keep_on_cpu=True)
        fields[FUSION] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[KEY] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> list[Any]:
        options = without_option(hf_processor_mm_kwargs)
        image, *others = super()._get_prompt_updates(mm_items, options, out_mm_kwargs)  # type: ignore[misc]
        token = self._placeholder(image)

        def kept(index: int) -> Any:
            item, whole = out_mm_kwargs["image"][index], image.replacement(index)
            if MASK not in item:
                return whole
            ids, drawn = getattr(whole, "full", whole), iter(item[MASK].data.tolist())
            # Marks around the tokens stay.
            return PromptUpdateDetails.select_token_id([i for i in ids if i != token or next(drawn)], token)

        return [PromptReplacement("image", image.target, kept), *others]

    def _placeholder(self, image: Any) -> int:
        """The id of one visual token, from what vLLM puts in an image's place."""
        if isinstance(image.target, str):
            return int(self.info.get_tokenizer().convert_tokens_to_ids(image.target))
        (token,) = image.target
        return int(token)

    # With vLLM's hash, [A, B] and [B, A] with the same option would share entries, although the lists are swapped.
    def _get_mm_hashes(self, inputs: Any) -> Mapping[str, list[str]]:
        options = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=without_option(options))
        hashes: dict[str, list[str]] = super()._get_mm_hashes(plain)  # type: ignore[misc]
        images = hashes.get("image", [])
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        marked = [
            MultiModalHasher.hash_kwargs(algorithm, image=plain_hash, option=option.identity)
            if option.identity
            else plain_hash
            for plain_hash, option in zip(images, image_options(options, len(images)), strict=True)
        ]
        return {**hashes, "image": marked} if images else hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, Any]:
        options = inputs.hf_processor_mm_kwargs
        if options.get(OPTION) is None:
            return dict(options)
        known = mm_is_cached.get("image", [])
        keep = [entry for entry, hit in zip(options[OPTION]["keep"], known, strict=True) if not hit]
        return {**options, OPTION: {**options[OPTION], "keep": keep}}


class SparseModelMixin:
    """For a family's model."""

    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if getattr(self, "is_multimodal_pruning_enabled", False):
            raise ValueError("video_pruning_rate changes positions in another way; leave it unset with this model")
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            raise ValueError("cudagraph_mm_encoder ignores the selection of tokens; leave it unset with this model")
        options = (vllm_config.additional_config or {}).get("vitos", {})
        self.encoded_images = EncodedImages(int(options.get("cached_images", CACHED_IMAGES)))
        self.embedding_dtype = vllm_config.model_config.dtype

    def single_images(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Inputs of the vision encoder, separately for each image."""
        raise NotImplementedError

    def dense_positions(self, length: int, features: Sequence[Any]) -> Tensor:
        """Positions (3, length) of the whole prompt; `features` are its images, at their places in it.

        Here those of a family that counts its tokens, on three equal axes; see `rope.py`.
        """
        return torch.arange(length).expand(3, -1)

    def streams(self, tokens: Tensor) -> Sequence[Tensor]:
        """The visual streams (N, hidden) in the encoder's output, the embeddings first; most families have no more."""
        return [tokens]

    def embed_multimodal(self, **inputs: Any) -> Any:
        """Visual tokens of each image: the given ones, or those of the encoder after selection and fusion."""
        inputs.pop(POSITIONS, None)
        if (given := inputs.pop(EMBEDDINGS, None)) is not None:
            return tuple(tokens.to(self.embedding_dtype) for tokens in given)
        masks, fusions, keys = (inputs.pop(name, None) for name in (MASK, FUSION, KEY))
        if masks is None:
            return super().embed_multimodal(**inputs)  # type: ignore[misc]
        out, start = [], 0
        # One by one: the tokens of an image must not depend on its batch, or on whether they were in the cache.
        for single, fusion, key in zip(self.single_images(inputs), fusions, keys, strict=True):
            whole = self.encoded_images.get(key, partial(self._encode, single))
            mask = masks[start : (start := start + len(whole))].to(whole.device)
            out.append(torch.cat(fuse(self.streams(whole), mask, fusion_of(fusion)), dim=-1))
        return tuple(out)

    def _encode(self, single: dict[str, Any]) -> Tensor:
        (tokens,) = super().embed_multimodal(**single)  # type: ignore[misc]
        return tokens  # type: ignore[no-any-return]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions (3, T) of a prompt, and the offset for generated tokens; see `positions.py`."""
        length = len(input_tokens)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        if features and POSITIONS in features[0].data:
            return as_given(features[0].data[POSITIONS].data, length)

        def dense(whole: int, starts: list[int]) -> Tensor:
            moved = [
                replace(feature, mm_position=replace(feature.mm_position, offset=start, length=len(mask)))
                for feature, start, (_, mask) in zip(features, starts, images, strict=True)
            ]
            return self.dense_positions(whole, moved)

        images = [(_first_token(f.mm_position), _mask(f)) for f in features]
        return with_gaps(length, images, dense)

    def load_weights(self, weights: Any) -> set[str]:
        """Load weights as the family does, and drop the visual tokens that the old ones computed."""
        self.encoded_images.clear()
        return super().load_weights(weights)  # type: ignore[misc, no-any-return]


def _first_token(place: Any) -> int:
    """Index of an image's first visual token; a mark may stand in front of it at the image's place in the prompt."""
    marks = 0 if place.is_embed is None else int(place.is_embed.int().argmax())
    return int(place.offset) + marks


def _mask(feature: Any) -> Tensor:
    if MASK in feature.data:
        return feature.data[MASK].data  # type: ignore[no-any-return]
    place = feature.mm_position  # of a video, or of an image that is sent whole
    return torch.ones(place.length if place.is_embed is None else int(place.is_embed.sum()), dtype=torch.bool)
