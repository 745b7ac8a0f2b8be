"""LLaVA: LLaVA-1.5, LLaVA-Med and HuatuoGPT-Vision-7B (2024) in their Hugging Face form.

CLIP sees one square of fixed size (ViT-L/14-336: 24 x 24 tokens, the CLS token dropped), an MLP maps each patch to one
visual token, and the language model (Llama, Mistral, Qwen2) has ordinary 1-D positions, which keep their gaps after
pruning. SigLIP (no CLS token) and DINOv2 are supported too. DINOv2 interpolates its positions to any square of whole
patches, so the image processor alone determines the size.

What sets it apart is how an image becomes that square, which the checkpoint's image processor determines:

- `do_pad`: padded to a square around its middle, then resized. Some cells lie outside the image.
- shortest edge and centre crop: the ends of the longer side are cut off, and no token covers them.
- a fixed height and width: stretched.

`VisualTokens.resized` is the size of the whole image at the encoder's scale, without padding and before the crop, so
that pixel coordinates count from the corner of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitos.backbones.attention import Attention, observe_attention
from vitos.backbones.base import Backbone, Capabilities, VisionGeometry, VllmModel
from vitos.core.geometry import Rect, TokenGrid
from vitos.core.prompt import PromptBatch, VisualTokens

DINOV2 = "dinov2"
CLS_FIRST = ("clip_vision_model", DINOV2)  # towers whose first token is the CLS token


class Llava(Backbone):
    """Backbone of `LlavaForConditionalGeneration`.

    Raises:
        ValueError: if the vision tower's tokens are not a grid of patches, or the image processor does not make the
            square that the tower takes.
    """

    model_types = ("llava",)
    capabilities = Capabilities(several_images=True, extra_streams=False, native_coordinates="normalized")
    vllm_model = VllmModel(
        "VitosLlavaForConditionalGeneration",
        "vitos.engines.vllm.plugin.llava:VitosLlava",
        config="vitos.engines.vllm.plugin.rope:ThreeAxes",
    )

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(model, tokenizer, image_processor)
        config, vision = model.config, model.config.vision_config
        has_cls = vision.model_type in CLS_FIRST
        if has_cls != (config.vision_feature_select_strategy == "default"):
            raise ValueError(
                f"vision tower {vision.model_type!r} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r}: the tokens are not a grid of patches; CLIP and DINOv2 "
                "need 'default' (their CLS token is dropped), SigLIP needs 'full'"
            )
        width, height = self._encoder_size()
        made = f"{width} x {height} pixels" if width else "images of no fixed size"
        if vision.model_type == DINOV2:
            if width != height or width < 1 or width % vision.patch_size:
                raise ValueError(
                    f"the image processor makes {made}, but {DINOV2} needs a square of whole patches of "
                    f"{vision.patch_size} pixels; correct size or crop_size in preprocessor_config.json"
                )
        elif (width, height) != (vision.image_size, vision.image_size):
            raise ValueError(
                f"the image processor makes {made}, but the vision tower takes {vision.image_size} x "
                f"{vision.image_size} pixels; correct size or crop_size in preprocessor_config.json"
            )

    @property
    def geometry(self) -> VisionGeometry:
        vision, processor = self.model.config.vision_config, self.image_processor
        pixels = self._encoder_size()[0] ** 2
        rules: dict[str, int | bool] = {"pad_to_square": self._pads, "centre_crop": bool(processor.do_center_crop)}
        rules |= {f"resize_{name}": int(value) for name, value in dict(processor.size).items() if value}
        return VisionGeometry(
            patch_size=vision.patch_size, merge_size=1, min_pixels=pixels, max_pixels=pixels, rules=rules
        )

    @classmethod
    def most_visual_tokens(cls, config: Any, max_pixels: int | None = None) -> int:
        if config.vision_config.model_type == DINOV2:
            return int(config.image_seq_length)
        return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)

    @property
    def vision_modules(self) -> Sequence[torch.nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    def encode(self, images: Sequence[Image.Image]) -> list[VisualTokens]:
        if not images:
            return []
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        dtype = self.model.model.multi_modal_projector.linear_1.weight.dtype
        features = self.model.model.get_image_features(pixels.to(self.device, dtype), return_dict=True).pooler_output
        vision = self.model.config.vision_config
        side = self._encoder_size()[0] // vision.patch_size
        seen = [self._seen(*image.size) for image in images]
        return [
            VisualTokens(tokens, TokenGrid.single(side, side, rect), resized=resized)
            for tokens, (rect, resized) in zip(features, seen, strict=True)
        ]

    def encoder_attention(self, image: Image.Image, depth: float = 1.0) -> Attention:
        """Attention of the CLS token, or the mean over all patches (SigLIP); at depth 1 in the layer that is used.

        If visual tokens are made from the outputs of several layers, the deepest of them counts.

        Raises:
            ValueError: if they are made from the patch embeddings alone.
        """
        config, vision = self.model.config, self.model.config.vision_config
        chosen = config.vision_feature_layer
        outputs = [chosen] if isinstance(chosen, int) else chosen
        used = max(i if i >= 0 else vision.num_hidden_layers + 1 + i for i in outputs)  # 0 is the patch embeddings
        if used == 0:
            raise ValueError(
                f"vision_feature_layer {chosen} is no layer with attention: it names the patch embeddings"
            )
        has_cls = config.vision_feature_select_strategy == "default"
        tower = self.model.model.vision_tower
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]

        def run() -> None:
            self.model.model.get_image_features(pixels.to(self.device, tower.dtype))

        dino = vision.model_type == DINOV2
        layer = math.ceil(depth * used) - 1
        module = tower.encoder.layer[layer].attention if dino else tower.encoder.layers[layer].self_attn
        seen = observe_attention(tower, module, run, query=0 if has_cls else None)
        return seen.tokens(slice(1, None)) if has_cls else seen  # patches only

    def encoder_output(self, batch: PromptBatch) -> Any:
        features: Any = (batch.embeddings[None],)  # (1, V, hidden): the model joins (images, tokens, hidden)
        return BaseModelOutputWithPooling(pooler_output=features)

    @property
    def _pads(self) -> bool:
        """Whether images are padded to a square; the setting has no effect in CLIP's image processor."""
        return bool(self.image_processor.do_pad) and hasattr(self.image_processor, "pad_to_square")

    def _encoder_size(self) -> tuple[int, int]:
        """Width and height of every image after the image processor; (0, 0) if they depend on the image."""
        processor = self.image_processor
        if processor.do_center_crop:
            return (processor.crop_size["width"], processor.crop_size["height"])
        return self._resized(1, 1) if self._pads or not processor.size.get("shortest_edge") else (0, 0)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the processor's resize, which fixes the shortest edge or both sides."""
        size = self.image_processor.size
        shortest = size.get("shortest_edge")
        if not shortest:
            return (size["width"], size["height"])
        if width <= height:
            return (shortest, int(shortest * height / width))
        return (int(shortest * width / height), shortest)

    def _seen(self, width: int, height: int) -> tuple[Rect, tuple[int, int]]:
        """The part of an image that the encoder's square shows, and the size of the whole image at its scale.

        The image processor moves images by whole pixels: by those of the original when it pads, by those of the
        resized image when it crops. The rectangle takes both into account.
        """
        square = max(width, height)
        canvas = (square, square) if self._pads else (width, height)
        resized, made, rect = self._resized(*canvas), self._encoder_size(), []
        for side, full, scaled, shown in zip((width, height), canvas, resized, made, strict=True):
            # A crop larger than the image pads it; an odd pixel goes to the left or top.
            first = (scaled - shown) // 2 if scaled >= shown else -math.ceil((shown - scaled) / 2)
            before, pixel = (full - side) // 2, full / scaled  # padding, size of a resized pixel: in original pixels
            rect.append([(edge * pixel - before) / side for edge in (first, first + shown)])
        (x1, x2), (y1, y2) = rect
        whole = (max(1, round(resized[0] * width / canvas[0])), max(1, round(resized[1] * height / canvas[1])))
        return Rect(x1, y1, x2, y2), whole
