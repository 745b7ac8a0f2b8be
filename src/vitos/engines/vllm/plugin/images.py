"""Whole images that the vision encoder has seen lately, so that the second request about one does not run it again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


def content_key(*parts: Tensor) -> Tensor:
    """128 bits of a hash of tensors on the CPU, as int64 (2,)."""
    digest = content_hash(*parts)
    return torch.tensor([int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)])


def content_hash(*parts: Tensor) -> bytes:
    """128 bits of a hash of the tensors' values, shapes and dtypes."""
    known = hashlib.blake2b(digest_size=16)
    for part in parts:
        known.update(f"{part.dtype}{tuple(part.shape)}".encode())
        known.update(part.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return known.digest()


class EncodedImages:
    """The encoder's output of the last `limit` images, by their content.

    Attributes:
        encoded, reused: images that ran through the encoder, and that did not have to.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.encoded = self.reused = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, key: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """Visual tokens (N, hidden) of an image; `encode` runs if they are not known."""
        name = tuple(key.tolist())
        if name in self._kept:
            self.reused += 1
            self._kept.move_to_end(name)
            return self._kept[name]
        self.encoded += 1
        tokens = encode()
        if self.limit:
            self._kept[name] = tokens.clone()  # vLLM may write into what it was given
            if len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return tokens

    def clear(self) -> None:
        """Forget all: the encoder's weights may have changed."""
        self._kept.clear()
