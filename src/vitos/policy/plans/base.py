"""What every plan is made of: its limits, what it asks for, what it returns, and its two branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from vitos.backbones.base import Backbone
from vitos.core.geometry import BoolArray, TokenGrid
from vitos.core.names import PlanName
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.response import Response
from vitos.core.sparsify import Selection
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Completion, Sampling
from vitos.engines.prefix import Prefix
from vitos.policy.types import Query, Rollout, Scan

if TYPE_CHECKING:
    from vitos.policy.vlm import SparseVLM

NO_BOX = "no box could be read; the whole image was used"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer may be; greedy.

    Attributes:
        max_tokens: of the reasoning branch.
        max_evidence_tokens: of the localization branch; evidence that is not complete by then is no evidence.
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
class Outcome:
    """What a plan found for one question; `mask` and `grid` as in `Finding`, `fallback` empty if it was followed."""

    localization: Rollout | None
    reasoning: Rollout
    grid: TokenGrid
    mask: BoolArray
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """What the reasoning branch gets of an image: its prompt, and which tokens of which grid that holds."""

    prompt: Prompt
    grid: TokenGrid
    selection: Selection


Steps = Generator[Request, list[Completion], list[Outcome]]
Rollouts = Generator[Request, list[Completion], list[Rollout]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a branch as it is written."""

    branch: str
    text: str


class Plan(ABC):
    """One way to answer. It holds no state."""

    name: ClassVar[PlanName]
    reduced: ClassVar[bool] = False
    """A scan begins with a reduced image."""

    def refusal(self, backbone: Backbone) -> str:
        """Why a family cannot follow the plan, and which it can; empty if it can."""
        return ""

    def visuals(self, vlm: SparseVLM, pictures: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        """The visual tokens that a scan for this plan begins with."""
        return vlm.encode_many([pictures])[0].visuals

    def scan(self, vlm: SparseVLM, pictures: Sequence[Image.Image]) -> Scan:
        """The images as this plan begins with them."""
        return Scan(self.visuals(vlm, pictures), pictures=tuple(pictures), reduced=self.reduced)

    def looks(
        self, vlm: SparseVLM, queries: Sequence[Query], responses: Sequence[Response], watch: Stopwatch
    ) -> list[Look]:
        """What reasoning gets after a localization, for training; the whole image where that cannot be followed.

        Raises:
            ValueError: for a plan that no model is trained under.
        """
        raise ValueError(f"no model is trained under plan {self.name}")

    @abstractmethod
    def steps(self, vlm: SparseVLM, queries: Sequence[Query], limits: Limits, watch: Stopwatch) -> Steps:
        """Ask for completions, return outcomes."""


def localized(vlm: SparseVLM, queries: Sequence[Query], limits: Limits) -> Rollouts:
    """Complete the localization branch of all questions."""
    prompts = vlm.localize_prompts(queries)
    completions = yield Request("localize", prompts, vlm.known_prefixes(queries, prompts), limits.localize)
    return [vlm.read_localization(q, c) for q, c in zip(queries, completions, strict=True)]


def reasoned(vlm: SparseVLM, queries: Sequence[Query], prompts: list[Prompt], limits: Limits) -> Rollouts:
    """Complete the reasoning branch of all questions behind their prompts."""
    completions = yield Request("reason", prompts, vlm.known_prefixes(queries, prompts), limits.reason)
    return [vlm.read_reasoning(q, c) for q, c in zip(queries, completions, strict=True)]
