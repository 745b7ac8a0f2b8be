"""MMTok."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, mask_of, selector

WORD_TEMPERATURE = 0.01
IMAGE_TEMPERATURE = 0.2
ALPHA = 0.5


@selector(title="MMTok", rank=112)
def mmtok(task: Task, count: int) -> Choice:
    """MMTok (arXiv 2508.18264): greedy choice of tokens that cover the question's words and the image's tokens.

    The authors compare image with image by the encoder's features before the projector, and use the temperature 0.02
    for words on LLaVA. Here all similarities are those of the embeddings that the language model sees.
    """

    def order() -> Tensor:
        words = task.question_embeddings.double().cpu()
        return coverage_order(task.tokens, words, task.tokens, task.grid.num_tokens)

    return Choice(mask_of(task.once("mmtok", order)[:count], task.grid.num_tokens), fusion=NO_FUSION)


def coverage_order(
    tokens: Tensor, words: Tensor, features: Tensor, count: int, temperature: float = WORD_TEMPERATURE
) -> Tensor:
    """The first `count` tokens in the greedy order of maximum coverage.

    A token covers a word (or a token) by its share of a softmax over all tokens of the cosine similarity divided by a
    temperature. What a set covers is the mean over words of its best share, plus `ALPHA` times the mean over tokens.

    Args:
        tokens: visual tokens, shape (N, hidden), and `words`, shape (M, hidden), for the words' coverage.
        features: visual tokens, shape (N, any), for the coverage of the image.
    """
    shares = (_shares(words, tokens, temperature), _shares(features, features, IMAGE_TEMPERATURE))
    covered = [torch.zeros(len(share), 1, dtype=share.dtype) for share in shares]
    taken = torch.zeros(len(tokens), dtype=torch.bool)
    order = []
    for _ in range(count):
        word_gain, image_gain = (
            (share - best).clamp(min=0).mean(0) for share, best in zip(shares, covered, strict=True)
        )
        chosen = int((word_gain + ALPHA * image_gain).masked_fill(taken, -torch.inf).argmax())
        order.append(chosen)
        taken[chosen] = True
        covered = [torch.maximum(best, share[:, [chosen]]) for share, best in zip(shares, covered, strict=True)]
    return torch.tensor(order)


def _shares(covered: Tensor, covering: Tensor, temperature: float) -> Tensor:
    """Shape (covered, covering); each row sums to 1."""
    unit = torch.nn.functional.normalize
    return (unit(covered, dim=-1) @ unit(covering, dim=-1).T / temperature).softmax(-1)
