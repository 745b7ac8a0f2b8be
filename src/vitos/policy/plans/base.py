"""The base of all plans: the requests that a plan makes, the outcomes that it returns, and the steps that most share.

A plan is a generator: it yields a `Request`, is sent the completions, and returns an `Outcome` per question. So the
same few lines answer one question or many, at once or token by token (`vitos.policy.run`), and a server can merge the
requests of several plans.
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
from vitos.engines.torch_engine import TorchEngine
from vitos.policy.branches import Branches
from vitos.policy.prefixes import with_prefixes
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query, Rollout, Scan


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Length limits of an answer, which is decoded greedily.

    >>> Limits(max_tokens=64, evidence_only=True).localize.stop
    ('</evidence>',)

    Attributes:
        max_tokens: largest number of tokens of the reasoning branch.
        max_evidence_tokens: largest number of tokens of the localization branch; evidence that is not complete by then
            is not used.
        evidence_only: whether the localization branch ends behind its evidence, without an answer.
        stop: strings that end the reasoning branch.
    """

    max_tokens: int = 256
    max_evidence_tokens: int = 256
    evidence_only: bool = False
    stop: tuple[str, ...] = ()

    @property
    def localize(self) -> Sampling:
        """How the localization branch is decoded."""
        return Sampling(self.max_evidence_tokens, stop=("</evidence>",) if self.evidence_only else ())

    @property
    def reason(self) -> Sampling:
        """How the reasoning branch is decoded."""
        return Sampling(self.max_tokens, stop=self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts that a plan wants completed.

    Attributes:
        branch: "localize" or "reason".
        prompts: the prompts, one per question.
        prefixes: for each prompt the part that has run already, or None.
        sampling: how the completions are decoded.
    """

    branch: str
    prompts: list[Prompt]
    prefixes: list[Prefix | None]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The input of the reasoning branch: a prompt, and the visual tokens that it contains."""

    prompt: Prompt
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a plan for one question.

    Attributes:
        localization: the rollout of the localization branch; None if there was none.
        reasoning: the rollout of the reasoning branch.
        boxes: the evidence, written by the model or given with the question.
        kept: visual tokens that the answer was given from.
    """

    localization: Rollout | None
    reasoning: Rollout
    boxes: tuple[Box, ...]
    kept: Kept


Steps = Generator[Request, list[Completion], list[Outcome]]
Rollouts = Generator[Request, list[Completion], list[Rollout]]


class Plan(ABC):
    """One way to answer a question. A plan has no state.

    A subclass sets the attributes that differ and defines `reason`, the input of the reasoning branch, which training
    and inference both call. `steps` serves all plans that localize once and then reason once. A plan that always
    answers from the upper half of the image:

    >>> from PIL import Image
    >>> from vitos import Box, SparseVLM
    >>> class UpperHalf(Plan):
    ...     localizes = False
    ...     def reason(self, branches, query, evidence, watch):
    ...         kept = branches.keep(query, [Box(0, 0, 1, 0.5)])
    ...         sparse = branches.sparse(query, branches.reason_prompt(query), kept)
    ...         return [Reasoning(sparse, kept)] * len(evidence)
    >>> vlm, watch = SparseVLM.from_pretrained("nano", device="cpu"), Stopwatch()
    >>> query = Query.about(vlm.encode(Image.new("RGB", (128, 128))), "What is shown?\\nA. cyst\\nB. nodule")
    >>> from vitos.policy.run import answer
    >>> (outcome,) = answer(UpperHalf("upper_half"), vlm.branches, vlm.engine, [query], Limits(), watch)
    >>> outcome.kept.ratio
    0.5

    As a file `upper_half.py` in `vitos/policy/plans`, or under an entry point of the group `vitos.plans`, it is used
    by `vlm.ask(…, plan="upper_half")` and `vitos ask … --plan upper_half`.
    """

    drops: ClassVar[bool] = True
    """Whether visual tokens are left out of the answer."""
    localizes: ClassVar[bool] = True
    """Whether the model writes boxes, unless they are given with the question."""
    reduced: ClassVar[bool] = False
    """Whether a scan begins with a reduced image."""
    needs_pictures: ClassVar[bool] = False
    """Whether the image is encoded a second time, so that a scan must contain the picture."""
    shares_prefix: ClassVar[bool] = False
    """Whether both branches go on behind one dense pass over system text and image."""
    no_vllm: ClassVar[str] = ""
    """Reason why vLLM cannot write the rollouts of training, behind "vllm"; empty if it can."""
    trainable: ClassVar[bool] = False
    """Whether a model can be trained under the plan."""
    takes_masks: ClassVar[bool] = False
    """Whether it can be told which visual tokens to keep, or how many; budgets, controls and selectors need this."""
    timed_as: ClassVar[str] = "sparsify"
    """Name of the span between the branches."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refusal(self, backbone: Backbone) -> str:
        """Reason why a family cannot follow the plan, with the plans that it can follow; empty if it can."""
        return ""

    def shared_layers(self, spec: VitosSpec) -> int | None:
        """Number of layers that questions about one image share in `Scan.prefix`; None for all of them."""
        return None

    def prepare(
        self, branches: Branches, engine: TorchEngine, queries: Sequence[Query], watch: Stopwatch
    ) -> Sequence[Query]:
        """What must have run before `steps`, put into the questions' scans."""
        return with_prefixes(branches, engine, queries, watch) if self.shares_prefix else queries

    def spec_problem(self, spec: VitosSpec) -> str:
        """The setting of a checkpoint that contradicts the plan; empty if there is none."""
        return ""

    def recipe_problems(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Keys of a recipe that contradict the plan, each with the reason and the remedy."""
        if not self.trainable:
            yield "sparsify.plan", f"no model can be trained under plan {self.name}; use two_pass, gather or coarse"
        why = f"sparsify.plan: {self.name} encodes an image twice"
        if self.needs_pictures:
            if recipe.data.cache is not None:
                yield "data.cache", f"contains whole images, but {why}; leave it out"
            if recipe.train.schedule == "dense":
                yield "train.schedule", f"dense reasons on whole images, but {why}; set plan two_pass"
            if recipe.train.sampler == "vllm":
                yield "train.sampler", f"vllm gets whole images, but {why}; use torch"
        if self.no_vllm and recipe.train.sampler == "vllm":
            yield "train.sampler", f"vllm {self.no_vllm}; use torch"
        if recipe.evaluate.budgets and not self.takes_masks:
            yield "evaluate.budgets", f"choose among the tokens of one image, but {why}; set them to []"

    def question_problem(self, query: Query) -> str:
        """Reason why the plan cannot answer a question as it is given; empty if it can."""
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
            return f"plan {self.name} encodes the image again, but the scan does not contain it; make it with encode()"
        return ""

    def visuals(self, branches: Branches, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        """The visual tokens that a scan for this plan begins with."""
        return branches.encode(pictures)

    def scan(self, branches: Branches, pictures: Sequence[Image.Image]) -> Scan:
        """The scan that this plan begins with."""
        return Scan(self.visuals(branches, pictures), pictures=tuple(pictures), reduced=self.reduced)

    # --- in training: the evidence of several rollouts -------------------------------------------------------------

    def evidence_prompt(self, branches: Branches, query: Query) -> Prompt:
        """The prompt whose completions say what the evidence is."""
        return branches.localize_prompt(query)

    def read_evidence(self, branches: Branches, query: Query, rollout: Rollout) -> Rollout:
        """A rollout of that prompt, as rewards and figures see it."""
        return rollout

    def reason_after(
        self, branches: Branches, query: Query, rollouts: Sequence[Rollout], watch: Stopwatch
    ) -> list[Reasoning]:
        """The input of the reasoning branch after each of these rollouts; as `reason`."""
        return self.reason(branches, query, [rollout.response.boxes for rollout in rollouts], watch)

    # --- in both -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def reason(
        self, branches: Branches, query: Query, evidence: Sequence[Sequence[Box]], watch: Stopwatch
    ) -> list[Reasoning]:
        """The input of the reasoning branch after each of a question's localizations.

        Args:
            branches: the prompts and parsers of the model.
            query: the question.
            evidence: the boxes of each localization: G rows in training, one in inference.
            watch: a stopwatch that counts encoded tokens; the caller times the span.

        Returns:
            One input per row. For a row that cannot be followed, the whole image with the reason in `kept`.
        """

    def prompt(self, branches: Branches, query: Query, kept: Kept, dense: Prompt | None = None) -> Prompt:
        """The reasoning prompt with given visual tokens, for plans that take masks.

        Args:
            branches: the prompts and parsers of the model.
            query: the question.
            kept: the visual tokens to keep.
            dense: the question's `Branches.reason_prompt`, if the caller has it already.

        Raises:
            ValueError: for other plans.
        """
        raise ValueError(f"plan {self.name} cannot be told which tokens to keep; use two_pass or gather")

    def steps(self, branches: Branches, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        """Yield requests for completions, then return an outcome per question; no request is empty."""
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
        """Complete the localization branch of the questions without evidence; None for the others."""
        asked = [q for q in queries if self.localizes and q.boxes is None and q.tokens is None]
        rollouts: Iterator[Rollout] = iter(())
        if asked:
            prompts = [branches.localize_prompt(query) for query in asked]
            request = Request(
                branch="localize",
                prompts=prompts,
                prefixes=branches.known_prefixes(asked, prompts),
                sampling=limits.localize,
            )
            completions = yield request
            rollouts = (branches.read_localization(q, c) for q, c in zip(asked, completions, strict=True))
        return [next(rollouts) if self.localizes and q.boxes is None and q.tokens is None else None for q in queries]


def reasoned(branches: Branches, queries: Sequence[Query], prompts: list[Prompt], limits: Limits) -> Rollouts:
    """Complete the reasoning branch of all questions behind their prompts."""
    completions = yield Request(
        branch="reason", prompts=prompts, prefixes=branches.known_prefixes(queries, prompts), sampling=limits.reason
    )
    return [branches.read_reasoning(q, c) for q, c in zip(queries, completions, strict=True)]


def evidence_of(query: Query, localization: Rollout | None) -> tuple[Box, ...]:
    """The boxes of a localization, or those given with the question."""
    return tuple(query.boxes or ()) if localization is None else localization.response.boxes
