"""Positions of a prompt whose images are pruned: those of the whole prompt, less the dropped columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gaps(
    length: int, images: Sequence[tuple[int, Tensor]], dense: Callable[[int, list[int]], Tensor]
) -> tuple[Tensor, int]:
    """Positions of a pruned prompt, and what is added to a later token's index to get its position.

    Args:
        length: tokens of the pruned prompt.
        images: of each image, in order: index of its first token in the pruned prompt, and which of its visual tokens
            are kept, bool (N,), one token in the prompt for each kept one.
        dense: (length of the whole prompt, first token of each image there) → its positions (axes, length).

    Returns:
        Positions (axes, length), and the offset of the tokens behind them.
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
    """The same for a prompt that brings its positions.

    Args:
        given: shape (axes, T + 1), of the prompt's T tokens and the first one behind them.
        length: tokens to place, T or more: a request that was put off is run again with what it had generated.
    """
    behind = given.shape[1] - 1
    later = given[:, -1:] + torch.arange(length - behind)
    return torch.cat([given[:, :-1], later], dim=1), int(given[0, -1]) - behind
