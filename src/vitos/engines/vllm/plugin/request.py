"""What a request says about its images: which visual tokens are kept, and what becomes of the others.

    mm_processor_kwargs={"vitos": {"keep": [[0, 1, 5], None], "fusion": "weighted", "beta": 0.15}}

`keep` has one entry per image: indices of visual tokens in the order of the family's grid (row by row), or None for
the whole image. Nothing here needs vLLM, so everything that a client can send is checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from vitos.core.sparsify import Fusion, FusionMode

OPTION = "vitos"
MODES = get_args(FusionMode)
NOT_FUSED = Fusion("none")

# Names of the entries that our processor adds to the data of an image in vLLM.
MASK = "vitos_mask"  # the kept visual tokens, bool (N,)
FUSION = "vitos_fusion"  # see fusion_of, float64 (2,)
KEY = "vitos_key"  # see images.content_key, int64 (2,)
EMBEDDINGS = "vitos_embeddings"  # visual tokens that were computed elsewhere, (V, hidden)
POSITIONS = "vitos_positions"  # see positions.as_given, int64 (3, T + 1)


@dataclass(frozen=True, slots=True)
class ImageOption:
    """What a request asks for one image.

    Attributes:
        keep: indices of the kept visual tokens, ascending; None for the whole image.
        fusion: what becomes of the other tokens.
    """

    keep: tuple[int, ...] | None = None
    fusion: Fusion = NOT_FUSED

    @property
    def identity(self) -> str | None:
        """A text that differs if the model's visual tokens of the same image would; None for the whole image."""
        if self.keep is None:
            return None
        return f"{','.join(map(str, self.keep))};{self.fusion.mode};{self.fusion.beta}"

    def mask(self, tokens: int) -> Tensor:
        """True for the kept ones of an image's `tokens` visual tokens, bool, shape (tokens,).

        Raises:
            ValueError: if an index lies outside the image.
        """
        if self.keep is None:
            return torch.ones(tokens, dtype=torch.bool)
        if self.keep[-1] >= tokens:
            raise ValueError(f"{OPTION}.keep names visual token {self.keep[-1]} of an image with {tokens} (from 0)")
        mask = torch.zeros(tokens, dtype=torch.bool)
        mask[list(self.keep)] = True
        return mask

    @property
    def fusion_row(self) -> list[float]:
        """The fusion as two numbers, for a tensor that vLLM passes on; see `fusion_of`."""
        return [float(MODES.index(self.fusion.mode)), self.fusion.beta]


def fusion_of(row: Tensor) -> Fusion:
    """The inverse of `fusion_row`."""
    mode, beta = row.tolist()
    return Fusion(MODES[int(mode)], beta)


def without_option(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request without ours, for code that does not know it."""
    return {name: value for name, value in options.items() if name != OPTION}


def image_options(options: Mapping[str, Any], images: int) -> list[ImageOption]:
    """What a request asks for each of its images.

    Args:
        options: all options of the request, ours among them under `vitos`.
        images: number of images in the request.

    Raises:
        ValueError: for a malformed option; the message says what is expected.
    """
    given = options.get(OPTION)
    if given is None:
        return [ImageOption()] * images
    if not isinstance(given, Mapping) or "keep" not in given or not set(given) <= {"keep", "fusion", "beta"}:
        raise ValueError(
            f'{OPTION} must be {{"keep": [indices or null, for each image]}}, with "fusion" and "beta" if wanted; '
            f"got {given!r:.200}"
        )
    keeps = given["keep"]
    if not isinstance(keeps, list | tuple) or len(keeps) != images:
        raise ValueError(f"{OPTION}.keep needs one list (or null) for each of {images} images, got {keeps!r:.200}")
    beta = given.get("beta", Fusion().beta)
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise ValueError(f"{OPTION}.beta must be a number in 0..1, got {beta!r:.200}")
    fusion = Fusion(given.get("fusion", "none"), float(beta))
    return [ImageOption() if keep is None else ImageOption(_indices(keep), fusion) for keep in keeps]


def _indices(keep: object) -> tuple[int, ...]:
    """A list of kept indices, sorted and without repeats."""
    if not isinstance(keep, list | tuple) or not keep:
        raise ValueError(
            f"{OPTION}.keep: an image keeps at least one visual token, as a list of indices; null keeps all, "
            f"got {keep!r:.200}"
        )
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in keep):
        raise ValueError(f"{OPTION}.keep: indices are whole numbers from 0, got {keep!r:.200}")
    return tuple(sorted(set(keep)))
