"""LLaVA: LLaVA-1.5, LLaVA-Med and HuatuoGPT-Vision-7B (2024) in their Hugging Face form.

CLIP sees one square of fixed size (ViT-L/14-336: 24 x 24 tokens, the CLS token dropped), an MLP maps each patch to one
visual token, and the language model (Llama, Mistral, Qwen2) has ordinary 1-D positions, which keep their gaps after
pruning. SigLIP (no CLS token) and DINOv2 are taken, too; DINOv2 fits its positions to any square of whole patches, so
the image processor alone decides the size.

What is peculiar is how an image becomes that square, and the checkpoint's image processor decides it:

- `do_pad`: padded to a square around its middle, then resized. Cells reach outside of the image.
- shortest edge and centre crop: the ends of the longer side are lost, and no token looks there.
- a fixed height and width: stretched.

`VisualTokens.resized` is the whole image at the encoder's scale, without padding and before the crop, so that pixel
coordinates count from the image's own corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitos.backbones.attention import Attention, observe_attention
from vitos.backbones.base import Backbone, Capabilities, VisionGeometry
from vitos.core.geometry import Rect, TokenGrid
from vitos.core.prompt import PromptBatch, VisualTokens

DINOV2 = "dinov2"
CLS_FIRST = ("clip_vision_model", DINOV2)  # towers whose first token is no patch


class Llava(Backbone):
    """`LlavaForConditionalGeneration` behind the package's protocol.

    Raises:
        ValueError: if the vision tower's tokens are no grid of patches, or the image processor does not make the
            square that it takes.
    """

    capabilities = Capabilities(several_images=True, extra_streams=False, native_coordinates="normalized")

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(model, tokenizer, image_processor)
        config, vision = model.config, model.config.vision_config
        has_cls = vision.model_type in CLS_FIRST
        if has_cls != (config.vision_feature_select_strategy == "default"):
            raise ValueError(
                f"vision tower {vision.model_type!r} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r}: its tokens are no grid of patches. "
                "CLIP and DINOv2 need 'default' (their CLS token is dropped), SigLIP needs 'full'."
            )
        made = self._encoder_size()
        if vision.model_type == DINOV2:
            if made[0] != made[1] or made[0] < 1 or made[0] % vision.patch_size:
                raise ValueError(
                    f"the image processor makes {made[0]} x {made[1]} pixels, but {DINOV2} needs a square of whole "
                    f"patches of {vision.patch_size}; correct size or crop_size in preprocessor_config.json"
                )
        elif made != (vision.image_size, vision.image_size):
            raise ValueError(
                f"the image processor makes {made[0]} x {made[1]} pixels, but the vision tower takes "
                f"{vision.image_size} x {vision.image_size}; correct size or crop_size in preprocessor_config.json"
            )

    @property
    def geometry(self) -> VisionGeometry:
        vision, processor = self.model.config.vision_config, self.image_processor
        pixels = self._encoder_size()[0] ** 2
        rules: dict[str, int | bool] = {"pad_to_square": self._pads, "centre_crop": bool(processor.do_center_crop)}
        rules |= {f"resize_{name}": int(value) for name, value in dict(processor.size).items() if value}
        return VisionGeometry(vision.patch_size, 1, pixels, pixels, rules)

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
            VisualTokens(tokens, TokenGrid.single(side, side, rect), resized)
            for tokens, (rect, resized) in zip(features, seen, strict=True)
        ]

    def encoder_attention(self, image: Image.Image) -> Attention:
        """What the CLS token gives, or all patches give on average (SigLIP), in the layer whose output is used.

        Where visual tokens are made of several layers' outputs, in the deepest of them.

        Raises:
            ValueError: if they are made of the patch embeddings alone.
        """
        config, vision = self.model.config, self.model.config.vision_config
        chosen = config.vision_feature_layer
        outputs = [chosen] if isinstance(chosen, int) else chosen
        depth = max(i if i >= 0 else vision.num_hidden_layers + 1 + i for i in outputs)  # 0: the patch embeddings
        if depth == 0:
            raise ValueError(f"vision_feature_layer {chosen} is no layer with attention")
        has_cls = config.vision_feature_select_strategy == "default"
        tower = self.model.model.vision_tower
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]

        def run() -> None:
            self.model.model.get_image_features(pixels.to(self.device, tower.dtype))

        dino = vision.model_type == DINOV2
        module = tower.encoder.layer[depth - 1].attention if dino else tower.encoder.layers[depth - 1].self_attn
        seen = observe_attention(tower, module, run, query=0 if has_cls else None)
        return Attention(seen.received[1:], seen.keys[1:]) if has_cls else seen

    def encoder_output(self, batch: PromptBatch) -> Any:
        features: Any = (batch.embeddings[None],)  # the model joins (images, tokens, hidden)
        return BaseModelOutputWithPooling(pooler_output=features)

    @property
    def _pads(self) -> bool:
        """Only LLaVA's own image processor pads to a square; in CLIP's the word has no effect."""
        return bool(self.image_processor.do_pad) and hasattr(self.image_processor, "pad_to_square")

    def _encoder_size(self) -> tuple[int, int]:
        """Width and height that the image processor makes of any image; (0, 0) if they depend on the image."""
        processor = self.image_processor
        if processor.do_center_crop:
            return (processor.crop_size["width"], processor.crop_size["height"])
        return self._resized(1, 1) if self._pads or not processor.size.get("shortest_edge") else (0, 0)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the processor's resize: the shortest edge is given, or both sides are."""
        size = self.image_processor.size
        shortest = size.get("shortest_edge")
        if not shortest:
            return (size["width"], size["height"])
        if width <= height:
            return (shortest, int(shortest * height / width))
        return (int(shortest * width / height), shortest)

    def _seen(self, width: int, height: int) -> tuple[Rect, tuple[int, int]]:
        """What the encoder's square shows of an image, and the size of the whole image at its scale, in pixels.

        All moves are whole pixels of the image processor: the padding of the original image, the crop of the resized.
        """
        square = max(width, height)
        canvas = (square, square) if self._pads else (width, height)
        resized, made, rect = self._resized(*canvas), self._encoder_size(), []
        for side, full, scaled, shown in zip((width, height), canvas, resized, made, strict=True):
            # A crop larger than the image pads it, with the odd pixel before it.
            first = (scaled - shown) // 2 if scaled >= shown else -math.ceil((shown - scaled) / 2)
            before, pixel = (full - side) // 2, full / scaled  # original pixels: padding, size of a resized one
            rect.append([(edge * pixel - before) / side for edge in (first, first + shown)])
        (x1, x2), (y1, y2) = rect
        whole = (max(1, round(resized[0] * width / canvas[0])), max(1, round(resized[1] * height / canvas[1])))
        return Rect(x1, y1, x2, y2), whole
