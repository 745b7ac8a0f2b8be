"""What a token selector is, what it is given and what it returns.

    @selector(title="Top rows")
    def top(task: Task, count: int) -> Choice:
        return Choice(mask_of(range(count), task.grid.num_tokens))

A selector is a function of a `Task` (one question, and everything that may be looked at) and a number of tokens. It
returns a `Choice`: the visual tokens that the model reasons from, and what happens to the others. Those of several
images are numbered image by image, and the number of tokens is one for all of them. A selector never sees the right
answer; gold boxes are for the oracle alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitos.backbones.attention import Attention
from vitos.backbones.base import Backbone
from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.core.registry import Registry
from vitos.core.sparsify import Fusion, Kept
from vitos.engines.base import derive_seed
from vitos.policy.plans import get_plan
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

NO_FUSION = Fusion("none")
T = TypeVar("T")
Need = Literal["boxes", "encoder_attention", "any_resolution"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The visual tokens that the model reasons from.

    Attributes:
        mask: bool, one entry per token of `visual` or, without one, of all images; at least one True.
        visual: tokens to use instead of the images' own: merged tokens in their places, or the tokens of a crop.
        fusion: how the dropped tokens enter the kept ones; None: as the policy was trained.
        plan: name of the plan by which the model reasons from them; None: the policy's.
        after: number of layers of the language model that see all tokens before the others leave; None: none does.
        prompt: the whole prompt of the reasoning branch, where a plan made it; None: it is made from the choice.
        fallback: whether there was no box to go by, so that the selector used its substitute; always counted.
    """

    mask: BoolArray
    _: KW_ONLY
    visual: VisualTokens | None = None
    fusion: Fusion | None = None
    plan: str | None = None
    after: int | None = None
    prompt: Prompt | None = None
    fallback: bool = False

    @property
    def count(self) -> int:
        """Number of tokens kept."""
        return int(self.mask.sum())


@dataclass(eq=False)
class Task:
    """One question about one scan, and what selectors need to know about it, each computed once.

    Attributes:
        policy: the model.
        query: the question and the visual tokens.
        record: the question as in its data set, with gold boxes.
        image: opens the first image as the encoder gets it, RGB.
        others: open the further images of a question about several.
        boxes: boxes of the policy's localization, in fractions of the original image; empty if none could be read.
        seed: seed of the random selectors.
        shared: store of what depends on the scan alone; pass the same dict for all questions about a scan.
    """

    policy: SparseVLM
    query: Query
    record: Record
    _: KW_ONLY
    image: Callable[[], Image.Image]
    others: Sequence[Callable[[], Image.Image]] = ()
    boxes: Sequence[Box] = ()
    seed: int = 0
    shared: dict[str, Any] = field(default_factory=dict)
    _own: dict[str, Any] = field(default_factory=dict, init=False)

    @cached_property
    def visual(self) -> VisualTokens:
        """Tokens of all images, image by image."""
        visuals = self.query.scan.visuals
        if len(visuals) == 1:
            return visuals[0]
        embeddings, *streams = (torch.cat(parts) for parts in zip(*(v.tensors for v in visuals), strict=True))
        return VisualTokens(embeddings, self.grid, resized=visuals[0].resized, streams=tuple(streams))

    @cached_property
    def grid(self) -> TokenGrid:
        """Where the tokens look."""
        return self.query.grid

    def rng(self, name: str) -> np.random.Generator:
        """The same generator for every budget, so that a smaller random choice is part of a larger one."""
        return np.random.default_rng(derive_seed(self.seed, name, self.record.id))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The value of `compute()`, kept for the question's other budgets."""
        return _kept(self._own, name, compute)

    def once_per_scan(self, name: str, compute: Callable[[], T]) -> T:
        """The value of `compute()`, kept for all questions about the scan."""
        return _kept(self.shared, name, compute)

    @property
    def attention(self) -> Attention:
        """Attention in the encoder layer that the visual tokens come from."""
        return self.once_per_scan("attention", lambda: self.policy.backbone.encoder_attention(self.image()).cpu())

    @property
    def tokens(self) -> Tensor:
        """The visual tokens, float64, shape (N, hidden)."""
        return self.once_per_scan("tokens", lambda: self.visual.embeddings.double().cpu())

    @cached_property
    def prompt(self) -> Prompt:
        """The dense prompt of the reasoning branch."""
        return self._prompt(self.query.scan.visuals)

    @cached_property
    def question_embeddings(self) -> Tensor:
        """Input embeddings of the question's tokens, without images and template; float32, shape (T, hidden)."""
        backbone = self.policy.backbone
        text = backbone.escape(self.query.question.replace(IMAGE_PLACEHOLDER, " ").strip())
        ids = torch.tensor(backbone.tokenizer(text, add_special_tokens=False)["input_ids"], device=backbone.device)
        # Not `no_grad`: gradient checkpointing leaves a hook on the embeddings that asks for gradients all the same.
        embeddings: Tensor = backbone.model.get_input_embeddings()(ids).detach().float()
        return embeddings

    def prompt_of(self, choice: Choice) -> Prompt:
        """The prompt of the reasoning branch with the chosen tokens.

        A choice of the image's own tokens follows the policy's plan, if the plan can be told which tokens to keep.
        """
        if choice.prompt is not None:
            return choice.prompt
        plan = self.policy.plan if choice.plan is None else get_plan(choice.plan)
        branches, dense = self.policy.branches, self.prompt
        if choice.visual is None:
            kept = Kept(self.grid, choice.mask)
            if choice.after is not None:
                return dense.prune(branches.masks(self.query, kept), choice.after)
            if choice.fusion is None and plan.takes_masks:
                return plan.prompt(branches, self.query, kept, dense)
            return branches.sparse(self.query, dense, kept, choice.fusion)
        if choice.visual.grid == self.grid:
            dense = replace(dense, embeddings=choice.visual.embeddings, streams=choice.visual.streams)
        else:
            dense = self._prompt((choice.visual, *self.query.scan.visuals[1:]))
        return branches.sparse(self.query, dense, Kept(choice.visual.grid, choice.mask), choice.fusion)

    def _prompt(self, visuals: Sequence[VisualTokens]) -> Prompt:
        text = self.policy.spec.reason_text(self.query.question, self.query.kind)
        return self.policy.backbone.build_prompt(text, visuals)


Choose = Callable[[Task, int], Choice | None]
F = TypeVar("F", bound=Choose)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A way to choose tokens, with what the commands and the tables need to know about it.

    Attributes:
        name: name in conditions, such as `divprune` in `divprune@0.25`.
        title: name in tables and figures.
        function: see `selector`.
        needs: "boxes" of a localization pass, "encoder_attention" of the family, or an encoder of "any_resolution".
        plan: name of a plan that the checkpoint must be able to follow; None if there is none.
        rank: place in the order in which selectors are run and listed.
        own_budget: place among the conditions with as many tokens as the policy's own boxes keep; None: it is not
            asked there.
        default: whether it is run where no selector is named.
    """

    name: str
    title: str
    function: Choose
    needs: tuple[Need, ...] = ()
    plan: str | None = None
    rank: int
    own_budget: int | None = None
    default: bool = True

    def choose(self, task: Task, count: int) -> Choice | None:
        """The tokens for a question, at most `count`.

        None if the selector is not defined for the question (no gold boxes, or several images where it goes by the
        encoder's attention or another resolution), or cannot do with so few tokens.
        """
        if task.grid.parts and {"encoder_attention", "any_resolution"} & set(self.needs):
            return None
        choice = self.function(task, count)
        return choice if choice is None or choice.count <= count else None

    def refusal(self, backbone: Backbone) -> str | None:
        """What the selector needs and the backbone lacks, as a sentence; None if it lacks nothing."""
        family = type(backbone)
        if "encoder_attention" in self.needs and family.encoder_attention is Backbone.encoder_attention:
            return f"selector {self.name!r} needs encoder attention, which {family.__name__} does not give"
        if self.plan and (problem := get_plan(self.plan).refusal(backbone)):
            return f"selector {self.name!r}: {problem}"
        if "any_resolution" in self.needs and not backbone.capabilities.any_resolution:
            return (
                f"selector {self.name!r} encodes images of a few tokens, but {family.__name__} makes the same number "
                "of tokens, or whole tiles, of every image"
            )
        return None


_REGISTERED: dict[str, Selector] = {}


def selector(
    *,
    title: str,
    needs: tuple[Need, ...] = (),
    plan: str | None = None,
    rank: int = 1000,
    own_budget: int | None = None,
    default: bool = True,
) -> Callable[[F], F]:
    """Make a function known as the selector of its name; `Selector` explains the arguments.

    The function returns `count` tokens; None if it is not defined for the question. If it cannot do with `count`
    tokens, it returns more: the question is then left out of the condition.

    Raises:
        ValueError: if a function of another module has the same name.
    """

    def register(function: F) -> F:
        name = function.__name__
        other = _REGISTERED.get(name)
        if other is not None and other.function.__module__ != function.__module__:
            raise ValueError(
                f"{other.function.__module__} and {function.__module__} both define the selector {name!r}; rename one"
            )
        _REGISTERED[name] = Selector(
            name=name,
            title=title,
            function=function,
            needs=needs,
            plan=plan,
            rank=rank,
            own_budget=own_budget,
            default=default,
        )
        return function

    return register


class SelectorTable(Mapping[str, Selector]):
    """All selectors by name, in the order of their ranks. The modules are imported when the table is first read.

    Raises:
        ValueError: if a module of the registry defines no selector.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Selector:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._found(), key=lambda name: (_REGISTERED[name].rank, name)))

    def __len__(self) -> int:
        return len(self._found())

    def _found(self) -> Mapping[str, Selector]:
        _ = self._modules
        return _REGISTERED

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        names = [module.__name__ for _, module in self._registry.modules()]
        defining = {known.function.__module__ for known in _REGISTERED.values()}
        if empty := [name for name in names if name not in defining]:
            raise ValueError(
                f"{empty[0]} defines no function with @selector; add it, or name the module that does in the entry "
                f"point ({self._registry.group})"
            )
        return tuple(names)


def mask_of(index: Tensor | np.ndarray | Sequence[int], total: int) -> BoolArray:
    """Bool mask, shape (total,), True at `index`."""
    mask = np.zeros(total, dtype=bool)
    mask[np.asarray(index.cpu() if isinstance(index, Tensor) else index)] = True
    return mask


def highest(scores: Tensor, count: int) -> BoolArray:
    """Mask of the `count` highest scores (N,); of equal scores the first."""
    return mask_of(torch.sort(scores, descending=True, stable=True).indices[:count], len(scores))


def mixed(visual: VisualTokens, mask: BoolArray, matrix: Tensor) -> VisualTokens:
    """Visual tokens with mixtures of all tokens in the kept places.

    Args:
        mask: bool, shape (N,), n of them True.
        matrix: weights, float32, shape (n, N), one row per kept token in order. A published merge that adds tokens up
            has rows that sum to more than 1.
    """
    keep = torch.from_numpy(mask).to(visual.embeddings.device)
    tensors = []
    for tensor in visual.tensors:
        tensor = tensor.clone()
        whole = matrix.to(tensor.device) @ tensor.float()
        tensor[keep] = whole.to(tensor.dtype)
        tensors.append(tensor)
    return replace(visual, embeddings=tensors[0], streams=tuple(tensors[1:]))


def _kept(store: dict[str, Any], name: str, compute: Callable[[], T]) -> T:
    if name not in store:
        store[name] = compute()
    value: T = store[name]
    return value
