"""What goes into a policy and what comes out of it: a scan, a question, rollouts, a finding; and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.names import PlanName
from vitos.core.prompt import VisualTokens
from vitos.core.record import IMAGE_PLACEHOLDER, AnswerKind, parse_options
from vitos.core.response import Response
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import ImageFacts
from vitos.engines.base import Completion
from vitos.engines.prefix import Prefix


@dataclass(frozen=True, slots=True)
class Scan:
    """The visual tokens of a question's image(s), computed once. Evidence boxes refer to the first image.

    Attributes:
        images: how each was opened (frame, slice, window, crop); empty where pictures were given, not files.
        pictures: the RGB images, for plans that look again; empty where nobody will.
        prefix: keys and values of system text and image(s), which questions share; None: each runs them itself. The
            model's weights must not change while it is in use.
        reduced: the first image's visual tokens are those of a reduced image (plan coarse).
    """

    visuals: tuple[VisualTokens, ...]
    images: tuple[ImageFacts, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    prefix: Prefix | None = None
    reduced: bool = False

    def of_files(self, images: Sequence[ImageFacts]) -> Scan:
        """The scan of pictures that were opened so: their tokens laid over the stored images."""
        placed = (v.within(facts.shown) for v, facts in zip(self.visuals, images, strict=True))
        return replace(self, visuals=tuple(placed), images=tuple(images))


@dataclass(frozen=True, slots=True)
class Query:
    """A question, with one `<image>` for each image of its scan, options inline; `kind` says what answers it."""

    scan: Scan
    question: str
    kind: AnswerKind = "letter"

    @classmethod
    def about(cls, scan: Scan, text: str) -> Query:
        """A user's question: placeholders in front where it has none; without options it wants a few words."""
        placed = text if IMAGE_PLACEHOLDER in text else IMAGE_PLACEHOLDER * len(scan.visuals) + text
        return cls(scan, placed, "letter" if parse_options(placed) else "text")

    @property
    def options(self) -> dict[str, str]:
        """Letter → text of the options that may be chosen; empty where the question asks for no letter."""
        return parse_options(self.question) if self.kind == "letter" else {}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of a branch and what could be read from it."""

    completion: Completion
    response: Response


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question, and where it comes from.

    Attributes:
        answer: option letter; where the question has no options, the answer's text. None: none could be read.
        thought: the reasoning branch's thought.
        boxes: evidence in fractions of the original image.
        kept: visual tokens of the first image that the answer was given from, bool (N,), on `grid`: the cells of the
            whole image at full resolution. Under plan crop: those that the crop covers.
        fallback: the plan could not be followed; `fallback_reason` says why and what was done instead.
        localization: None under plan dense.
        seconds, tokens: time and tokens of each stage: encoded ("vision"), run ("prefix", "…_prefill") or written
            ("…_decode"). Of several questions answered together, those of all; the scan's making is not here.
        images: how the scan's files were opened (frame, slice, window, crop).
    """

    answer: str | None
    thought: str | None
    boxes: tuple[Box, ...]
    kept: BoolArray
    fallback: bool
    localization: Rollout | None
    reasoning: Rollout
    seconds: dict[str, float]
    images: tuple[ImageFacts, ...]
    plan: PlanName
    grid: TokenGrid
    fallback_reason: str
    tokens: dict[str, int]

    def with_encoding(self, watch: Stopwatch) -> Finding:
        """The same with what making the scan cost added to its seconds and tokens."""
        seconds = {n: watch.seconds.get(n, 0.0) + self.seconds.get(n, 0.0) for n in watch.seconds | self.seconds}
        tokens = {n: watch.tokens.get(n, 0) + self.tokens.get(n, 0) for n in watch.tokens | self.tokens}
        return replace(self, seconds=seconds, tokens=tokens)

    @property
    def kept_ratio(self) -> float:
        """Share of the first image's visual tokens that the answer was given from, in (0, 1]."""
        return float(self.kept.mean())


def tokens_read(tokens: Mapping[str, int]) -> int:
    """Of `Finding.tokens` those that the language model ran, text and visual ones, the image's prefix included."""
    return sum(count for name, count in tokens.items() if name == "prefix" or name.endswith("_prefill"))


def tokens_written(tokens: Mapping[str, int]) -> int:
    """Of `Finding.tokens` those that the language model wrote."""
    return sum(count for name, count in tokens.items() if name.endswith("_decode"))
