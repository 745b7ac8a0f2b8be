"""What a token selector is given and what it gives back.

A selector is a function of a `Task` (one question about one image, with everything that may be looked at) and a number
of tokens. It answers with a `Choice`: which visual tokens of the first image the model reasons from, and what becomes
of the others. It never sees the right answer; gold boxes are for the oracle alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.core.sparsify import Fusion, Kept
from vitos.engines.base import derive_seed
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

NO_FUSION = Fusion("none")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice:
    """The visual tokens of the first image that the model reasons from.

    Attributes:
        mask: bool, one entry for every token of `visual` or, without one, of the whole image; at least one True.
        visual: tokens to take instead of the image's own: merged ones in their places, or those of a crop.
        fusion: how the dropped tokens enter the kept ones; None: as the policy was trained.
        fallback: there was no box to go by, so the selector's substitute was used; always counted.
    """

    mask: BoolArray
    visual: VisualTokens | None = None
    fusion: Fusion | None = None
    fallback: bool = False

    @property
    def count(self) -> int:
        """Tokens kept."""
        return int(self.mask.sum())


class Task:
    """One question about one scan, with what selectors ask of it, each computed once.

    Args:
        boxes: of the policy's localization; empty where none could be read.
        seed: of the random selectors.
        image: opens the first image as the encoder gets it, RGB.
        shared: what depends on the scan alone; pass the same dict for all questions about it.
    """

    def __init__(
        self,
        policy: SparseVLM,
        query: Query,
        record: Record,
        *,
        boxes: Sequence[Box] = (),
        seed: int = 0,
        image: Callable[[], Image.Image],
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self.query = query
        self.record = record
        self.boxes = tuple(boxes)
        self.image = image
        self._seed = seed
        self._shared: dict[str, Any] = {} if shared is None else shared
        self._own: dict[str, Any] = {}

    @property
    def visual(self) -> VisualTokens:
        """Tokens of the first image, the one that is pruned; further images stay whole."""
        return self.query.scan.visuals[0]

    @property
    def grid(self) -> TokenGrid:
        return self.visual.grid

    def rng(self, name: str) -> np.random.Generator:
        """The same for every budget, so that a smaller random choice is part of a larger one."""
        return np.random.default_rng(derive_seed(self._seed, name, self.record.id))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, kept for the question's other budgets."""
        if name not in self._own:
            self._own[name] = compute()
        value: T = self._own[name]
        return value

    def once_per_scan(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, kept for all questions about the scan."""
        if name not in self._shared:
            self._shared[name] = compute()
        value: T = self._shared[name]
        return value

    @cached_property
    def prompt(self) -> Prompt:
        """The dense prompt of the reasoning branch."""
        return self._prompt(self.query.scan.visuals)

    @cached_property
    def question_embeddings(self) -> Tensor:
        """Input embeddings of the question's tokens, without images and template, float32, shape (T, hidden)."""
        backbone = self.policy.backbone
        text = backbone.escape(self.query.question.replace(IMAGE_PLACEHOLDER, " ").strip())
        ids = torch.tensor(backbone.tokenizer(text, add_special_tokens=False)["input_ids"], device=backbone.device)
        with torch.no_grad():
            embeddings: Tensor = backbone.model.get_input_embeddings()(ids).float()
        return embeddings

    def prompt_of(self, choice: Choice) -> Prompt:
        """The prompt of the reasoning branch that shows what was chosen.

        A choice of the image's own tokens follows the policy's plan, where that can be told which to keep.
        """
        plan = self.policy.plan
        if choice.visual is None and choice.fusion is None and plan.takes_masks:
            return plan.prompt(self.policy.branches, self.query, Kept(self.grid, choice.mask), self.prompt)
        visuals = self.query.scan.visuals
        dense = self.prompt
        if choice.visual is not None and choice.visual.grid != self.grid:
            dense = self._prompt((choice.visual, *visuals[1:]))
        elif choice.visual is not None:
            dense = _with_first(dense, choice.visual)
        kept = Kept(self.grid if choice.visual is None else choice.visual.grid, choice.mask)
        return self.policy.branches.sparse(self.query, dense, kept, choice.fusion)

    def _prompt(self, visuals: Sequence[VisualTokens]) -> Prompt:
        return self.policy.backbone.build_prompt(
            self.policy.spec.reason_text(self.query.question, self.query.kind), visuals
        )


def _with_first(dense: Prompt, visual: VisualTokens) -> Prompt:
    """The prompt with other embeddings in the places of its first image."""
    count = visual.grid.num_tokens
    embeddings, *streams = (
        torch.cat([new, old[count:]])
        for new, old in zip(visual.tensors, (dense.embeddings, *dense.streams), strict=True)
    )
    return replace(dense, embeddings=embeddings, streams=tuple(streams))


def mask_of(index: Tensor | np.ndarray | Sequence[int], total: int) -> BoolArray:
    """Bool mask, shape (total,), True at `index`."""
    mask = np.zeros(total, dtype=bool)
    mask[np.asarray(index.cpu() if isinstance(index, Tensor) else index)] = True
    return mask


def highest(scores: Tensor, count: int) -> BoolArray:
    """Mask of the `count` highest scores (N,), of equal ones the first."""
    return mask_of(torch.sort(scores, descending=True, stable=True).indices[:count], len(scores))


def mixed(visual: VisualTokens, mask: BoolArray, matrix: Tensor) -> VisualTokens:
    """Tokens in whose kept places stand mixtures of all tokens.

    Args:
        mask: bool, shape (N,), n of them True.
        matrix: shape (n, N), float32, one row for every kept token in order; every row sums to 1.
    """
    keep = torch.from_numpy(mask).to(visual.embeddings.device)
    tensors = []
    for tensor in visual.tensors:
        tensor = tensor.clone()
        whole = matrix.to(tensor.device) @ tensor.float()
        tensor[keep] = whole.to(tensor.dtype)
        tensors.append(tensor)
    return replace(visual, embeddings=tensors[0], streams=tuple(tensors[1:]))
