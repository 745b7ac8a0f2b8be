"""Log-probabilities of chosen tokens without the logits of all tokens: the language-model head runs in chunks.

With G x K completions of T tokens, logits of G * K * T x vocabulary would be by far the largest tensor of an update
(72 completions of 256 tokens over 152,064 words in float32: 11 GB). Here the head sees a few hundred hidden states at
a time, and its logits are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitos.backbones.patching import patched

HEAD_TOKENS = 512
"""Number of hidden states that the head sees at once."""


@contextmanager
def chunked_head(
    head: torch.nn.Module,
    sources: Tensor,
    targets: Tensor,
    log_softmax: Callable[[Tensor], Tensor],
    chunk: int = HEAD_TOKENS,
    entropy: bool = False,
) -> Iterator[list[Tensor]]:
    """While the block runs, the head returns log-probabilities (1, N, 1) instead of logits (B, T, vocabulary).

    With `entropy` it returns (1, N, 2): log-probability and entropy of the whole distribution, in nats.

    The head's `forward` is replaced for this time and restored at the end, also if the block raises. A replacement of
    `forward` that another library has made is kept: it computes the logits. The head still runs inside the model's
    forward pass, where wrappers such as FSDP provide its weights and see its output, forward and backward.

    Args:
        head: the module that maps hidden states to logits.
        sources: indices of the hidden states to use, into B * T, shape (N,).
        targets: the token that each of them is to predict, shape (N,).
        log_softmax: function from logits (n, vocabulary) to log-probabilities of the same shape.
        chunk: number of hidden states at once, >= 1.
        entropy: whether entropies are computed, too.

    Yields:
        A list of what the head has returned, to be compared with the model's output (see `check_untouched`).
    """
    logits_of = head.forward
    given: list[Tensor] = []

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        log_p = log_softmax(logits_of(hidden))  # (n, vocabulary)
        chosen = log_p.gather(-1, wanted[:, None])[None]
        if not entropy:
            return chosen
        finite = log_p.masked_fill(log_p.isinf(), 0.0)  # p · log p is 0 where p is 0
        return torch.cat([chosen, -(log_p.exp() * finite).sum(-1)[None, :, None]], dim=-1)

    def forward(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, -2)[sources]  # (N, hidden)
        parts = [
            checkpoint(part, h, t, use_reentrant=False) if torch.is_grad_enabled() else part(h, t)
            for h, t in zip(chosen.split(chunk), targets.split(chunk), strict=True)
        ]
        given.append(torch.cat(parts, dim=1))  # (1, N, 1 or 2), not a view: FSDP attaches its hook to it
        return given[-1]

    with patched(head, "forward", forward):
        yield given


def check_untouched(given: list[Tensor], logits: Tensor, family: str) -> None:
    """Check that the model returned what its head gave, and nothing computed from it.

    Args:
        given: what the head returned, from `chunked_head`.
        logits: what the model returned.
        family: name of the model for the message.

    Raises:
        ValueError: if the model changes its logits after the head (scales or caps them), so that log-probabilities
            computed before would be wrong.
    """
    if len(given) != 1 or given[0].shape != logits.shape or not bool(_same(given[0], logits)):
        raise ValueError(
            f"{family} changes its logits behind the language-model head (for example by final_logit_softcapping); "
            "its completions cannot be scored; use a model without that"
        )


def _same(a: Tensor, b: Tensor) -> Tensor:
    # Not torch.equal: values that are not finite are reported with the loss.
    return ((a == b) | a.isnan()).all()
