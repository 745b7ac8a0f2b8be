"""Positions of a prompt whose images are pruned: those of the whole prompt without the dropped tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gaps(
    length: int, images: Sequence[tuple[int, Tensor]], dense: Callable[[int, list[int]], Tensor]
) -> tuple[Tensor, int]:
    """Positions of a pruned prompt.

    Args:
        length: number of tokens of the pruned prompt.
        images: index of each image's first token in the pruned prompt, and a mask of its kept visual tokens, bool,
            shape (N,); in order. The prompt has one token per kept visual token.
        dense: function from the length of the whole prompt and the index of each image's first token in it to its
            positions (axes, length).

    Returns:
        Positions (axes, length), and the number to add to the index of a later token to get its position.
    """
    keep: list[Tensor] = []
    starts: list[int] = []
    done = whole = 0
    for first, mask in images:
        keep += [torch.ones(first - done, dtype=torch.bool), mask]
        starts.append(whole + first - done)
        whole = starts[-1] + len(mask)
        done = first + int(mask.sum())
    keep.append(torch.ones(length - done, dtype=torch.bool))
    positions = dense(whole + length - done, starts)
    return positions[:, torch.cat(keep)], int(positions.max()) + 1 - length


def as_given(given: Tensor, length: int) -> tuple[Tensor, int]:
    """The same result for a prompt that comes with its positions.

    Args:
        given: positions of the prompt's T tokens and of the first token after them, shape (axes, T + 1).
        length: number of tokens to place, at least T: a request that vLLM interrupted is run again together with the
            tokens that it had generated.
    """
    behind = given.shape[1] - 1
    later = given[:, -1:] + torch.arange(length - behind)
    return torch.cat([given[:, :-1], later], dim=1), int(given[0, -1]) - behind
