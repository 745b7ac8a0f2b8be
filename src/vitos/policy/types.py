"""The inputs and outputs of a policy: a scan, a question, rollouts, a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from numpy.typing import NDArray
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
    """The visual tokens of a question's image(s), computed once. `Box.image` is the place of an image here, from 1.

    Two scans are equal only if they are the same object.

    >>> from PIL import Image
    >>> from vitos import SparseVLM
    >>> scan = SparseVLM.from_pretrained("nano", device="cpu").encode(Image.new("RGB", (128, 128)))
    >>> scan.visuals[0].grid.num_tokens  # nano sees 16 x 16 pixels per token
    64

    Attributes:
        visuals: the visual tokens of each image.
        images: facts on how each file was opened (frame, slice, window, crop); empty for pictures that were not files.
        pictures: the RGB images, for plans that encode again; empty for other plans.
        prefix: keys and values of system text and image(s), which questions share; None if each question runs them
            itself. The model's weights must not change while it is in use.
        lead: text with one `<image>` per image that goes in front of a question without one, such as the numbers of
            slices (`data/series.py`); empty for the placeholders alone.
        reduced: whether the visual tokens are those of reduced images (plan coarse).
    """

    visuals: tuple[VisualTokens, ...]
    _: KW_ONLY
    images: tuple[ImageFacts, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    prefix: Prefix | None = None
    lead: str = ""
    reduced: bool = False

    def of_files(self, images: Sequence[ImageFacts]) -> Scan:
        """The same scan with facts on its files, and its tokens laid over the stored images."""
        placed = (v.within(facts.shown) for v, facts in zip(self.visuals, images, strict=True))
        return replace(self, visuals=tuple(placed), images=tuple(images))


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A question about a scan.

    Attributes:
        scan: the image(s).
        question: the text with one `<image>` per image of the scan, options inline.
        kind: form of the answer: an option's letter, a word, a number, a list, or a few words.
        boxes: evidence given by a person, in fractions of the original image; the model then does not localize.
        budget: share of the visual tokens of all images to keep, in (0, 1]; None to follow the keep rule.
        tokens: the visual tokens of all images to keep, exactly, bool (N,); the model then does not localize.
        scores: scores of the visual tokens of all images by the evidence head, shape (N,), once it has read the
            question; None before, and under other plans.

    Raises:
        ValueError: for a budget outside (0, 1], no box, a box in an image that is not there, or a mask of another
            shape or without a token.
    """

    scan: Scan
    question: str
    kind: AnswerKind = "letter"
    _: KW_ONLY
    boxes: tuple[Box, ...] | None = None
    budget: float | None = None
    tokens: BoolArray | None = None
    scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"the budget is a share of the visual tokens in (0, 1], got {self.budget}")
        if self.boxes is not None and not self.boxes:
            raise ValueError("the list of boxes is empty; leave `boxes` out to let the model localize")
        if missing := [box.image for box in self.boxes or () if box.image > len(self.scan.visuals)]:
            raise ValueError(f"a box lies in image {missing[0]}, but the question has {len(self.scan.visuals)}")
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
        """A user's question: placeholders are put in front if it has none; without options it asks for a few words."""
        placed = text if IMAGE_PLACEHOLDER in text else (scan.lead or IMAGE_PLACEHOLDER * len(scan.visuals)) + text
        kind: AnswerKind = "letter" if parse_options(placed) else "text"
        return cls(scan, placed, kind, boxes=None if boxes is None else tuple(boxes), budget=budget, tokens=tokens)

    @property
    def grid(self) -> TokenGrid:
        """The grid of the visual tokens of all images."""
        return TokenGrid.joined([visual.grid for visual in self.scan.visuals])

    @property
    def written(self) -> bool:
        """Whether the answer is a text in the model's own words, not a letter."""
        return self.kind != "letter"

    @property
    def options(self) -> dict[str, str]:
        """Letter → text of the options that may be chosen; empty if the question does not ask for a letter."""
        return parse_options(self.question) if self.kind == "letter" else {}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of a branch and the boxes, thought and answer that were read from it."""

    completion: Completion
    response: Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one question, and the evidence that it was given from.

    >>> from PIL import Image
    >>> from vitos import Box, SparseVLM
    >>> vlm = SparseVLM.from_pretrained("nano", device="cpu")
    >>> scan = vlm.encode(Image.new("RGB", (128, 128)))
    >>> finding = vlm.ask(scan, "What is shown?\\nA. nodule\\nB. cyst", boxes=[Box(0, 0, 0.5, 0.5)])
    >>> finding.boxes, finding.kept.count, finding.kept_ratio
    ((Box(x1=0, y1=0, x2=0.5, y2=0.5, image=1),), 16, 0.25)

    Attributes:
        answer: the option's letter or, for a question without options, the answer's text; None if none could be read.
        thought: the thought of the reasoning branch; None if none could be read.
        boxes: evidence in fractions of the original image, written by the model or given by a person.
        kept: visual tokens that the answer was given from, image by image, on the grids of the whole images at full
            resolution; under plan crop, those that the crop covers.
        localization: the rollout of the localization branch; None if there was none (plan dense, or given boxes).
        reasoning: the rollout of the reasoning branch.
        seconds, tokens: time and tokens of each span: encoded ("vision"), run ("prefix", "…_prefill") or written
            ("…_decode"). For questions answered together, those of all of them. The encoding of the scan is not
            included; `with_encoding` adds it.
        images: facts on how the scan's files were opened (frame, slice, window, crop).
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
        """The same finding with the cost of encoding the scan added to its seconds and tokens."""
        seconds = {n: watch.seconds.get(n, 0.0) + self.seconds.get(n, 0.0) for n in watch.seconds | self.seconds}
        tokens = {n: watch.tokens.get(n, 0) + self.tokens.get(n, 0) for n in watch.tokens | self.tokens}
        return replace(self, seconds=seconds, tokens=tokens)

    @property
    def kept_ratio(self) -> float:
        """Share of the visual tokens of all images that the answer was given from, in (0, 1]."""
        return self.kept.ratio

    @property
    def grid(self) -> TokenGrid:
        """The grid of the visual tokens of all images."""
        return self.kept.grid

    @property
    def fallback(self) -> bool:
        """Whether the plan could not be followed."""
        return bool(self.kept.why_not)

    @property
    def fallback_reason(self) -> str:
        """Reason why the plan could not be followed, and what was done instead; empty if it was followed."""
        return self.kept.why_not


def tokens_read(tokens: Mapping[str, int]) -> int:
    """Number of tokens in `Finding.tokens` that the language model read, those of the image's prefix included."""
    return sum(count for name, count in tokens.items() if name == "prefix" or name.endswith("_prefill"))


def tokens_written(tokens: Mapping[str, int]) -> int:
    """Number of tokens in `Finding.tokens` that the language model wrote."""
    return sum(count for name, count in tokens.items() if name.endswith("_decode"))
