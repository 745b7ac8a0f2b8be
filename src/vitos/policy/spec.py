"""`vitos.json`: the prompts and settings that a checkpoint was trained with, saved with its weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vitos.backbones.base import Backbone, CoordinateStyle, VisionGeometry
from vitos.backbones.evidence_head import FILE_NAME as HEAD_FILE
from vitos.backbones.evidence_head import HEADS, HeadKind
from vitos.core.answers import FORMS
from vitos.core.numbering import IMAGE_PLACEHOLDER, numbered
from vitos.core.record import AnswerKind
from vitos.core.registry import PLANS
from vitos.core.sparsify import Fusion, KeepRule
from vitos.data.files import write_json_atomic

FILE_NAME = "vitos.json"
FORMAT = 1

LOCALIZE_PROMPT = """{question}
First think inside <think></think>, then give the boxes of the evidence as \
<evidence>[[x1, y1, x2, y2], ...]</evidence> ({coordinates}), \
then {answer} as <answer></answer>."""
REASON_PROMPT = """{question}
First think inside <think></think>, then give {answer} as <answer></answer>."""
# How a prompt shows the form of a box, of any checkpoint; with several images it begins with the image's number.
BOX_FORM = "[[x1, y1, x2, y2]"
BOX_FORM_IN_IMAGE = "[[image number, x1, y1, x2, y2]"
COORDINATE_TEXT: dict[CoordinateStyle, str] = {
    "normalized": "fractions of the image's width and height from its top left corner",
    "absolute": "pixels of the image",
    "per_mille": "from 0 to 1000 over the image's width and height",
}


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """How the evidence head of a checkpoint is used (plans one_pass and glance).

    Attributes:
        after: number of layers that see all tokens; the head reads their output.
        keep: share of the visual tokens to keep, in (0, 1], unless a question has a budget.
        threshold: probability of evidence, in (0, 1), above which tokens are kept instead; None to keep the share.
        kind: what the head is: "pointer" (ours), or "glimpse", a rival.
        file: name of the file with the head's weights.

    Raises:
        ValueError: for a value out of its range.
    """

    after: int
    keep: float = 0.25
    threshold: float | None = None
    kind: HeadKind = "pointer"
    file: str = HEAD_FILE

    def __post_init__(self) -> None:
        if self.after < 0 or not 0 < self.keep <= 1 or (self.threshold is not None and not 0 < self.threshold < 1):
            raise ValueError(f"after must be >= 0, keep in (0, 1] and threshold in (0, 1), got {self}")
        if self.kind not in HEADS:
            raise ValueError(f"kind must be one of {', '.join(HEADS)}, got {self.kind!r}")
        if Path(self.file).name != self.file:
            raise ValueError(f"file must be a name in the checkpoint's folder, got {self.file!r}")


@dataclass(frozen=True, kw_only=True)
class VitosSpec:
    """How a checkpoint is prompted and sparsified.

    >>> spec = VitosSpec(reason_prompt="{question} Give {answer}.")
    >>> spec.reason_text("Which lobe?", "word")
    'Which lobe? Give the answer in one word.'

    Attributes:
        localize_prompt, reason_prompt: templates with `{question}`, optionally `{answer}` (replaced by "the letter of
            the right option", "the answer in one word" …) and, for the first, optionally `{coordinates}`.
        coordinates: convention of the numbers in `<evidence>`.
        answer_with: the form of answers in supervised targets, an option's letter or its text; both are always read.
        keep: the rule that chooses the kept tokens.
        fusion: the rule by which the other tokens enter the kept ones.
        positions: "keep" for the dense positions, or "renumber" (an ablation).
        plan: name of the plan by which questions are answered, and which decides in training how reasoning sees the
            image. Under gather nothing is fused: the kept tokens' keys and values have seen the others.
        geometry: the vision geometry of the training; None before the first save.
        evidence_head: how the checkpoint's evidence head is used; None if it has none.

    Raises:
        ValueError: naming the field with a value that is not allowed.
    """

    localize_prompt: str = LOCALIZE_PROMPT
    reason_prompt: str = REASON_PROMPT
    coordinates: CoordinateStyle = "normalized"
    answer_with: Literal["letter", "text"] = "letter"
    keep: KeepRule = field(default_factory=KeepRule)
    fusion: Fusion = field(default_factory=Fusion)
    positions: Literal["keep", "renumber"] = "keep"
    plan: str = "two_pass"
    geometry: VisionGeometry | None = None
    evidence_head: HeadRule | None = None

    def __post_init__(self) -> None:
        for name in ("localize_prompt", "reason_prompt"):
            if "{question}" not in getattr(self, name):
                raise ValueError(f"{name} must contain {{question}}, got {getattr(self, name)!r}")
        for name, known in (
            ("coordinates", get_args(CoordinateStyle)),
            ("answer_with", ("letter", "text")),
            ("positions", ("keep", "renumber")),
            ("plan", PLANS.names()),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def localize_text(self, question: str, kind: AnswerKind = "letter") -> str:
        """The user message of the localization branch. Several images are numbered, and boxes begin with a number."""
        text = self.localize_prompt.replace("{coordinates}", COORDINATE_TEXT[self.coordinates])
        if question.count(IMAGE_PLACEHOLDER) > 1:
            text = text.replace(BOX_FORM, BOX_FORM_IN_IMAGE)
        return text.replace("{answer}", FORMS[kind].request).replace("{question}", numbered(question))

    def reason_text(self, question: str, kind: AnswerKind = "letter") -> str:
        """The user message of the reasoning branch."""
        return self.reason_prompt.replace("{answer}", FORMS[kind].request).replace("{question}", numbered(question))

    def save(self, folder: Path, backbone: Backbone) -> None:
        """Write `vitos.json` with the backbone's geometry."""
        data = dataclasses.asdict(dataclasses.replace(self, geometry=backbone.geometry))
        if self.evidence_head is None:
            del data["evidence_head"]
        write_json_atomic(folder / FILE_NAME, {"format": FORMAT, **data})

    @classmethod
    def load(cls, path: str | Path) -> VitosSpec | None:
        """The spec in a checkpoint's folder, or None if there is no `vitos.json` (an ordinary model).

        Raises:
            ValueError: if the file does not parse or has another format; the message names the file.
        """
        file = Path(path) / FILE_NAME
        if not file.is_file():
            return None
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f"format is not {FORMAT}; it was written by another program or version of vitos")
            head = data.pop("evidence_head", None)
            return cls(
                **data
                | {
                    "evidence_head": HeadRule(**head) if head else None,
                    "keep": KeepRule(**data["keep"]),
                    "fusion": Fusion(**data["fusion"]),
                    "geometry": VisionGeometry(**data["geometry"]) if data["geometry"] else None,
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a valid {FILE_NAME}: {error}") from error

    def check_geometry(self, backbone: Backbone, where: str) -> None:
        """Refuse a backbone in which a pixel belongs to another visual token than in training.

        Raises:
            ValueError: if the geometries differ; `where` begins the message.
        """
        if self.geometry is not None and self.geometry != backbone.geometry:
            raise ValueError(
                f"{where}: trained with {self.geometry}, but the image processor is set to {backbone.geometry}; "
                "boxes would shift. Restore preprocessor_config.json, or remove min_pixels/max_pixels overrides."
            )
