"""Visual tokens of the latest images, so that a second request about an image does not run the encoder again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


def content_key(*parts: Tensor) -> Tensor:
    """`content_hash` of tensors as a tensor on the CPU, int64, shape (2,)."""
    digest = content_hash(*parts)
    return torch.tensor([int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)])


def content_hash(*parts: Tensor) -> bytes:
    """A hash of 128 bits of the tensors' values, shapes and dtypes; the tensors must be on the CPU."""
    known = hashlib.blake2b(digest_size=16)
    for part in parts:
        known.update(f"{part.dtype}{tuple(part.shape)}".encode())
        known.update(part.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return known.digest()


class EncodedImages:
    """The encoder's output for the last `limit` images, by their content.

    Attributes:
        encoded: number of images that ran through the encoder.
        reused: number of images that were found here instead.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.encoded = self.reused = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, key: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """The visual tokens of an image, shape (N, hidden); `encode` runs if they are not here."""
        name = tuple(key.tolist())
        if name in self._kept:
            self.reused += 1
            self._kept.move_to_end(name)
            return self._kept[name]
        self.encoded += 1
        tokens = encode()
        if self.limit:
            self._kept[name] = tokens.clone()  # vLLM may write into the tensor that it receives
            if len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return tokens

    def clear(self) -> None:
        """Drop all images, because the encoder's weights may have changed."""
        self._kept.clear()
