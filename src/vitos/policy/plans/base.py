"""What every plan is made of: what it asks for, what it returns, and the steps that most plans share.

A plan is a generator of what it wants sampled: it yields a `Request`, is sent the completions, and returns an
`Outcome` for each question. So the same few lines answer one question or many, at once or token by token
(`vitos.policy.run`), and a server may merge the requests of several plans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from vitos.backbones.base import Backbone
from vitos.config.recipe import Recipe
from vitos.core.geometry import Box
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion, Sampling
from vitos.engines.prefix import Prefix
from vitos.policy.branches import Branches
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query, Rollout, Scan


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long an answer may be; greedy.

    Attributes:
        max_tokens: largest number of tokens of the reasoning branch.
        max_evidence_tokens: largest number of tokens of the localization branch; evidence that is not complete by then
            is no evidence.
        evidence_only: end the localization branch behind its evidence, without its own answer.
        stop: strings that end the reasoning branch.
    """

    max_tokens: int = 256
    max_evidence_tokens: int = 256
    evidence_only: bool = False
    stop: tuple[str, ...] = ()

    @property
    def localize(self) -> Sampling:
        return Sampling(self.max_evidence_tokens, stop=("</evidence>",) if self.evidence_only else ())

    @property
    def reason(self) -> Sampling:
        return Sampling(self.max_tokens, stop=self.stop)


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts of one branch ("localize" or "reason") to be completed, with the prefixes that need not run again."""

    branch: str
    prompts: list[Prompt]
    prefixes: list[Prefix | None]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the reasoning branch gets of a question: its prompt, and the visual tokens that the prompt holds."""

    prompt: Prompt
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a plan found for one question.

    Attributes:
        localization: None where nothing was localized.
        boxes: the evidence, written by the model or given with the question.
        kept: visual tokens of the first image that the answer was given from.
    """

    localization: Rollout | None
    reasoning: Rollout
    boxes: tuple[Box, ...]
    kept: Kept


Steps = Generator[Request, list[Completion], list[Outcome]]
Rollouts = Generator[Request, list[Completion], list[Rollout]]


class Plan(ABC):
    """One way to answer. It holds no state.

    A subclass sets the attributes that differ and says in `reason` what the reasoning branch gets; training and
    inference both call it. `steps` serves every plan that localizes once and then reasons once.
    """

    localizes: ClassVar[bool] = True
    """The model writes boxes, unless the question brings them."""
    reduced: ClassVar[bool] = False
    """A scan begins with a reduced image."""
    needs_pictures: ClassVar[bool] = False
    """The image is encoded a second time, so a scan must hold the picture."""
    shares_prefix: ClassVar[bool] = False
    """Both branches go on behind one dense pass over system text and image."""
    trainable: ClassVar[bool] = False
    """A model can be trained under it."""
    takes_masks: ClassVar[bool] = False
    """It can be told which visual tokens to keep, or how many: what budgets, controls and selectors need."""
    timed_as: ClassVar[str] = "sparsify"
    """Name of the span between the branches."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refusal(self, backbone: Backbone) -> str:
        """Why a family cannot follow the plan, and which it can; empty if it can."""
        return ""

    def spec_problem(self, spec: VitosSpec) -> str:
        """What in a checkpoint's settings contradicts the plan; empty if nothing does."""
        return ""

    def recipe_problems(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Keys of a recipe that contradict the plan, each with the reason and the remedy."""
        if not self.trainable:
            yield "sparsify.plan", f"no model is trained under plan {self.name}; use two_pass, gather or coarse"
        why = f"sparsify.plan: {self.name} encodes an image twice"
        if self.needs_pictures:
            if recipe.data.cache is not None:
                yield "data.cache", f"holds whole images, but {why}; leave it out"
            if recipe.train.schedule == "dense":
                yield "train.schedule", f"dense reasons on whole images, but {why}; set plan two_pass"
            if recipe.train.sampler == "vllm":
                yield "train.sampler", f"vllm is given whole images, but {why}; use torch"
        if recipe.evaluate.budgets and not self.takes_masks:
            yield "evaluate.budgets", f"choose among the tokens of one image, but {why}; set them to []"

    def question_problem(self, query: Query) -> str:
        """What a question brings that the plan cannot use; empty if nothing."""
        if not self.localizes and (query.boxes is not None or query.budget is not None or query.tokens is not None):
            return (
                f"plan {self.name} answers from all visual tokens; leave out boxes and budget, or choose another plan"
            )
        if not self.takes_masks and (query.budget is not None or query.tokens is not None):
            return (
                f"a budget chooses among the tokens of one image, and plan {self.name} encodes it twice; leave out "
                "the budget, or choose two_pass or gather"
            )
        if query.scan.reduced != self.reduced:
            return f'the scan was made for another plan than {self.name}; use encode(…, plan="{self.name}")'
        if self.needs_pictures and not query.scan.pictures:
            return f"plan {self.name} encodes the image again, which the scan does not hold; make it with encode()"
        return ""

    def visuals(self, branches: Branches, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        """The visual tokens that a scan for this plan begins with."""
        return branches.encode(pictures)

    def scan(self, branches: Branches, pictures: Sequence[Image.Image]) -> Scan:
        """The images as this plan begins with them."""
        return Scan(self.visuals(branches, pictures), pictures=tuple(pictures), reduced=self.reduced)

    @abstractmethod
    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        """What the reasoning branch gets after each of a question's localizations.

        Args:
            evidence: boxes, a row per localization: G of them in training, one in inference.
            watch: gets the encoded tokens; the caller times the span.

        Returns:
            As many as there are rows. Where a row cannot be followed, the whole image with the reason in `kept`.
        """

    def prompt(self, branches: Branches, query: Query, kept: Kept, dense: Prompt | None = None) -> Prompt:
        """The reasoning prompt of given visual tokens, for plans that take masks.

        Args:
            dense: `Branches.reason_prompt` of the question, where the caller has it already.

        Raises:
            ValueError: for other plans.
        """
        raise ValueError(f"plan {self.name} cannot be told which tokens to keep; use two_pass or gather")

    def steps(self, branches: Branches, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        """Ask for completions, return outcomes; no request is empty."""
        localizations = yield from self.localized(branches, queries, limits)
        evidence = [evidence_of(query, rollout) for query, rollout in zip(queries, localizations, strict=True)]
        with watch.span(self.timed_as):
            ready = [
                self.reason(branches, query, [boxes], watch)[0] for query, boxes in zip(queries, evidence, strict=True)
            ]
        answered = yield from reasoned(branches, queries, [one.prompt for one in ready], limits)
        return [
            Outcome(localization=localization, reasoning=rollout, boxes=boxes, kept=one.kept)
            for localization, rollout, boxes, one in zip(localizations, answered, evidence, ready, strict=True)
        ]

    def localized(
        self, branches: Branches, queries: Sequence[Query], limits: Limits
    ) -> Generator[Request, list[Completion], list[Rollout | None]]:
        """Complete the localization branch of the questions that bring no evidence; None for the others."""
        asked = [q for q in queries if self.localizes and q.boxes is None and q.tokens is None]
        rollouts: Iterator[Rollout] = iter(())
        if asked:
            prompts = [branches.localize_prompt(query) for query in asked]
            request = Request("localize", prompts, branches.known_prefixes(asked, prompts), limits.localize)
            completions = yield request
            rollouts = (branches.read_localization(q, c) for q, c in zip(asked, completions, strict=True))
        return [next(rollouts) if self.localizes and q.boxes is None and q.tokens is None else None for q in queries]


def reasoned(branches: Branches, queries: Sequence[Query], prompts: list[Prompt], limits: Limits) -> Rollouts:
    """Complete the reasoning branch of all questions behind their prompts."""
    completions = yield Request("reason", prompts, branches.known_prefixes(queries, prompts), limits.reason)
    return [branches.read_reasoning(q, c) for q, c in zip(queries, completions, strict=True)]


def evidence_of(query: Query, localization: Rollout | None) -> tuple[Box, ...]:
    """The boxes that a localization wrote, or those that the question brings."""
    return tuple(query.boxes or ()) if localization is None else localization.response.boxes
