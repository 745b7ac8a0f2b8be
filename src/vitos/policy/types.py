"""What goes into a policy and what comes out of it: a scan, a question, rollouts, a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vitos.core.geometry import BoolArray, Box, TokenGrid
from vitos.core.prompt import VisualTokens
from vitos.core.record import IMAGE_PLACEHOLDER, AnswerKind, parse_options
from vitos.core.response import Response
from vitos.core.sparsify import Kept
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import ImageFacts
from vitos.engines.base import Completion
from vitos.engines.prefix import Prefix


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """The visual tokens of a question's image(s), computed once. Evidence boxes refer to the first image.

    Two scans are equal if they are the same object.

    Attributes:
        images: how each was opened (frame, slice, window, crop); empty where pictures were given, not files.
        pictures: the RGB images, for plans that encode again; empty where none will.
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


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A question about a scan.

    Attributes:
        question: text with one `<image>` for each image of the scan, options inline.
        kind: what answers it: an option's letter, a word, a few words.
        boxes: evidence given by a person, in fractions of the original image; the model does not localize then.
        budget: share of the first image's visual tokens to keep, in (0, 1]; None: as the keep rule says.
        tokens: keep exactly these visual tokens of the first image, bool (N,); the model does not localize then.
    """

    scan: Scan
    question: str
    kind: AnswerKind = "letter"
    boxes: tuple[Box, ...] | None = None
    budget: float | None = None
    tokens: BoolArray | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"the budget is a share of the visual tokens in (0, 1], got {self.budget}")
        if self.boxes is not None and not self.boxes:
            raise ValueError("no box is given; leave `boxes` out to let the model localize")
        if self.tokens is not None and (self.tokens.shape != (self.grid.num_tokens,) or not self.tokens.any()):
            raise ValueError(f"tokens must be a mask of {self.grid.num_tokens} visual tokens that keeps at least one")

    @classmethod
    def about(
        cls,
        scan: Scan,
        text: str,
        *,
        boxes: Sequence[Box] | None = None,
        budget: float | None = None,
        tokens: BoolArray | None = None,
    ) -> Query:
        """A user's question: placeholders in front where it has none; without options it wants a few words."""
        placed = text if IMAGE_PLACEHOLDER in text else IMAGE_PLACEHOLDER * len(scan.visuals) + text
        kind: AnswerKind = "letter" if parse_options(placed) else "text"
        return cls(scan, placed, kind, None if boxes is None else tuple(boxes), budget, tokens)

    @property
    def grid(self) -> TokenGrid:
        """Where the visual tokens of the first image look."""
        return self.scan.visuals[0].grid

    @property
    def options(self) -> dict[str, str]:
        """Letter → text of the options that may be chosen; empty where the question asks for no letter."""
        return parse_options(self.question) if self.kind == "letter" else {}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of a branch and what could be read from it."""

    completion: Completion
    response: Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one question, and where it comes from.

    Attributes:
        answer: option letter; where the question has no options, the answer's text. None: none could be read.
        thought: the thought of the reasoning branch.
        boxes: evidence in fractions of the original image, written by the model or given by a person.
        kept: visual tokens of the first image that the answer was given from, on the grid of the whole image at full
            resolution. Under plan crop: those that the crop covers.
        localization: None where nothing was localized: under plan dense, or with given boxes.
        seconds, tokens: time and tokens of each span: encoded ("vision"), run ("prefix", "…_prefill") or written
            ("…_decode"). Of several questions answered together, those of all; the making of the scan is not here.
        images: how the scan's files were opened (frame, slice, window, crop).
        plan: name of the plan that was followed.
    """

    answer: str | None
    thought: str | None
    boxes: tuple[Box, ...]
    kept: Kept
    localization: Rollout | None
    reasoning: Rollout
    seconds: dict[str, float]
    tokens: dict[str, int]
    images: tuple[ImageFacts, ...]
    plan: str

    def with_encoding(self, watch: Stopwatch) -> Finding:
        """The same with what making the scan cost added to its seconds and tokens."""
        seconds = {n: watch.seconds.get(n, 0.0) + self.seconds.get(n, 0.0) for n in watch.seconds | self.seconds}
        tokens = {n: watch.tokens.get(n, 0) + self.tokens.get(n, 0) for n in watch.tokens | self.tokens}
        return replace(self, seconds=seconds, tokens=tokens)

    @property
    def kept_ratio(self) -> float:
        """Share of the first image's visual tokens that the answer was given from, in (0, 1]."""
        return self.kept.ratio

    @property
    def grid(self) -> TokenGrid:
        """Where the visual tokens of the first image look."""
        return self.kept.grid

    @property
    def fallback(self) -> bool:
        """The plan could not be followed."""
        return bool(self.kept.why_not)

    @property
    def fallback_reason(self) -> str:
        """Why the plan could not be followed and what was done instead; empty if it was."""
        return self.kept.why_not


def tokens_read(tokens: Mapping[str, int]) -> int:
    """Of `Finding.tokens` those that the language model ran, text and visual ones, the image's prefix included."""
    return sum(count for name, count in tokens.items() if name == "prefix" or name.endswith("_prefill"))


def tokens_written(tokens: Mapping[str, int]) -> int:
    """Of `Finding.tokens` those that the language model wrote."""
    return sum(count for name, count in tokens.items() if name.endswith("_decode"))
