"""Selectors by visual embeddings: by their diversity, by their similarity to the question, or by both.

They use the tokens as the language model would see them, and drop the others without fusion, as published.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, mask_of, selector
from vitos.eval.selectors.spread import FloatArray, IntArray, determinant_order, max_min_order


@selector(title="DivPrune", rank=90)
def divprune(task: Task, count: int) -> Choice:
    """DivPrune (arXiv 2503.02175): greedy max-min diversity under the cosine distance 1 − cos.

    The first token is the one farthest from its nearest neighbour; each next one is the farthest from those chosen.
    """
    order = task.once_per_scan("divprune", lambda: max_min_order(1.0 - cosines(task.tokens)))
    return Choice(mask_of(order[:count], task.grid.num_tokens), fusion=NO_FUSION)


@selector(title="Question similarity", rank=110)
def question(task: Task, count: int) -> Choice:
    """The tokens most similar to the question, by `relevance` (the conditional part of CDPruner alone)."""
    return Choice(highest(task.once("relevance", lambda: relevance(task)), count), fusion=NO_FUSION)


@selector(title="CDPruner", rank=100)
def cdpruner(task: Task, count: int) -> Choice:
    """CDPruner (arXiv 2506.10967): the determinantal point process with the kernel L = diag(r) S diag(r).

    S is the cosine similarity of the visual tokens, r their relevance to the question, scaled to 0..1 over the image.
    The subset with the largest determinant is approximated greedily. The relevance uses the language model's own
    embeddings, as the paper does for models without a paired text encoder.
    """
    return Choice(mask_of(conditional_order(task, 1)[:count], task.grid.num_tokens), fusion=NO_FUSION)


@selector(title="CDPruner, sign turned", rank=101, default=False)
def cdpruner_negated(task: Task, count: int) -> Choice:
    """CDPruner with the sign of its authors' LLaVA code: tokens *least* similar to the question are relevant.

    There the similarity is that of CLIP's two encoders, whose patch embeddings point away from fitting words. The
    language model's embeddings have no such rule, so this is for comparison.
    """
    return Choice(mask_of(conditional_order(task, -1)[:count], task.grid.num_tokens), fusion=NO_FUSION)


def conditional_order(task: Task, sign: int) -> IntArray:
    """All tokens in CDPruner's greedy order; the sign is that of the relevance."""

    def order() -> IntArray:
        similar = task.once_per_scan("cosines", lambda: cosines(task.tokens))
        scores = task.once("relevance", lambda: relevance(task)).double().cpu().numpy()
        return determinant_order(conditional_kernel(similar, sign * scores))

    return task.once(f"cdpruner {sign}", order)


def conditional_kernel(similar: FloatArray, scores: FloatArray) -> FloatArray:
    """diag(r) S diag(r) with r = scores scaled to 0..1; a small offset keeps the smallest r above 0."""
    low, high = scores.min(), scores.max()
    scaled = (scores - low + 1e-6) / (high - low + 1e-6)
    return np.asarray(scaled[:, None] * similar * scaled[None])


def relevance(task: Task) -> Tensor:
    """Cosine similarity of each visual token to the question's tokens, averaged over these; float32, shape (N,)."""
    visual = torch.nn.functional.normalize(task.visual.embeddings.float(), dim=-1)
    words = torch.nn.functional.normalize(task.question_embeddings.to(visual.device), dim=-1)
    return visual @ words.mean(0)


def cosines(tokens: Tensor) -> FloatArray:
    """Cosine similarity of all tokens (N, hidden), shape (N, N)."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return np.asarray((unit @ unit.T).clamp(-1, 1).cpu().numpy())
