"""Log-probabilities of chosen tokens without the logits of all: the language-model head in chunks.

With G x K completions of T tokens, logits of G·K·T x vocabulary would be the largest tensor of an update by far
(72 completions of 256 tokens over 152,064 words in float32: 11 GB). Here the head sees a few hundred hidden states at
a time, and its logits are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HEAD_TOKENS = 512
"""Hidden states that the head sees at once."""


@contextmanager
def chunked_head(
    head: torch.nn.Module,
    sources: Tensor,
    targets: Tensor,
    log_softmax: Callable[[Tensor], Tensor],
    chunk: int = HEAD_TOKENS,
) -> Iterator[list[Tensor]]:
    """While the block runs, the head gives log-probabilities (1, N, 1) instead of logits (B, T, vocabulary).

    It stays inside the model's own forward pass, where wrappers such as FSDP hold its weights ready and see its
    output, in forward and backward.

    Args:
        sources: shape (N,), indices into B·T of the hidden states to use.
        targets: shape (N,), the token that each shall predict.
        log_softmax: logits (n, vocabulary) → log-probabilities, of the same shape.
        chunk: hidden states at once, >= 1.

    Yields:
        What the head has given, to be compared with what the model made of it (see `check_untouched`).
    """
    own = vars(head).get("forward")  # set where a library has put its hook there
    logits_of = head.forward
    given: list[Tensor] = []

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        return log_softmax(logits_of(hidden)).gather(-1, wanted[:, None])[None]

    def forward(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, -2)[sources]
        parts = [
            checkpoint(part, h, t, use_reentrant=False) if torch.is_grad_enabled() else part(h, t)
            for h, t in zip(chosen.split(chunk), targets.split(chunk), strict=True)
        ]
        given.append(torch.cat(parts, dim=1))  # no view: FSDP hangs its hook on it
        return given[-1]

    module: Any = head
    module.forward = forward
    try:
        yield given
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def check_untouched(given: list[Tensor], logits: Tensor, family: str) -> None:
    """The model's `logits` are what the head gave.

    Raises:
        ValueError: if the model changes its logits behind the head (scales or caps them): log-probabilities made
            before that would be wrong.
    """
    if len(given) != 1 or given[0].shape != logits.shape or not bool(_same(given[0], logits)):
        raise ValueError(
            f"{family} changes its logits behind the language-model head (such as final_logit_softcapping); its "
            "completions cannot be scored yet"
        )


def _same(a: Tensor, b: Tensor) -> Tensor:
    # Not torch.equal: values that are not finite are reported where the loss is.
    return ((a == b) | a.isnan()).all()
