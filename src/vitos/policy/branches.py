"""The prompts and parsers of both branches: a backbone and a spec, without an engine.

    localize_prompt ─► (sampled) ─► read_localization ─► boxes ─► keep ─► sparse ─► (sampled) ─► read_reasoning

Plans (`vitos.policy.plans`) are built from these methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.geometry import Box, TokenGrid
from vitos.core.masks import fit_budget
from vitos.core.numbering import image_numbers
from vitos.core.prompt import Prompt, VisualTokens
from vitos.core.record import AnswerKind
from vitos.core.response import format_box_list, parse_localization, parse_reasoning
from vitos.core.sparsify import Fusion, Kept, select
from vitos.engines.base import Completion
from vitos.engines.prefix import Prefix
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Query, Rollout, Scan


@dataclass(frozen=True, slots=True)
class Branches:
    """How one model is asked, and how its texts are read.

    Attributes:
        backbone: the loaded model.
        spec: prompts, coordinates, keep rule and fusion.
    """

    backbone: Backbone
    spec: VitosSpec

    # --- images -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> tuple[VisualTokens, ...]:
        """The visual tokens of RGB images.

        Each image is encoded alone: the last bits of a matrix product can depend on the other rows of the batch, and
        the tokens of an image must not depend on its batch, or on whether they were encoded now or for the cache.
        """
        return tuple(self.backbone.encode([image])[0] for image in images)

    def encode_many(self, images: Sequence[Sequence[Image.Image]]) -> list[Scan]:
        """One scan per sequence of RGB images."""
        return [Scan(self.encode(group)) for group in images]

    # --- prompts ----------------------------------------------------------------------------------------------------

    def localize_prompt(self, query: Query) -> Prompt:
        """Dense prompt of the localization branch."""
        return self.backbone.build_prompt(self.spec.localize_text(query.question, query.kind), query.scan.visuals)

    def reason_prompt(self, query: Query) -> Prompt:
        """Dense prompt of the reasoning branch."""
        return self.backbone.build_prompt(self.spec.reason_text(query.question, query.kind), query.scan.visuals)

    def length_problem(self, question: str, kind: AnswerKind, longest: int) -> str:
        """Why a question is too long for the model, told from its text alone; empty if it is not.

        Args:
            longest: largest number of tokens of an answer.
        """
        text = self.backbone.escape(self.spec.localize_text(question, kind))
        tokens = len(self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"])
        try:
            self.backbone.check_room(tokens, longest)
        except ValueError as error:
            return str(error)
        return ""

    def keep(self, query: Query, boxes: Sequence[Box], grid: TokenGrid | None = None) -> Kept:
        """Visual tokens that boxes keep: by the spec's keep rule, or by the question's budget.

        Without a box all tokens are kept, whatever the budget. This is a counted fallback.

        Args:
            query: the question.
            boxes: the evidence.
            grid: where the tokens look; None: as those of the question's scan.
        """
        grid = grid or query.grid
        if query.tokens is not None:
            return Kept(grid, query.tokens)
        if query.budget is None or not boxes:
            return select(grid, boxes, self.spec.keep)
        return Kept(grid, fit_budget(grid, boxes, max(1, round(query.budget * grid.num_tokens))))

    def masks(self, query: Query, kept: Kept) -> list[Tensor]:
        """One keep mask for each image of a question, bool (N_k,); images that `kept` does not cover stay whole."""
        masks = [torch.from_numpy(one.mask) for one in kept.images]
        whole = (torch.ones(v.grid.num_tokens, dtype=torch.bool) for v in query.scan.visuals[len(masks) :])
        return [*masks, *whole]

    def sparse(self, query: Query, dense: Prompt, kept: Kept, fusion: Fusion | None = None) -> Prompt:
        """A dense prompt of the question with the kept visual tokens only, the others fused into them.

        Args:
            query: the question.
            dense: its dense prompt.
            kept: the visual tokens to keep.
            fusion: how the dropped tokens enter the kept ones; None for the spec's fusion.
        """
        if kept.all:
            return dense
        renumber = self.spec.positions == "renumber"
        return dense.sparse(self.masks(query, kept), fusion or self.spec.fusion, renumber=renumber)

    def known_prefixes(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> list[Prefix | None]:
        """The prefix of each prompt's scan; None where there is none or the prompt does not begin with it."""
        prefixes = [query.scan.prefix for query in queries]
        model = self.backbone.model
        return [x if x and x.covers(p, model) else None for p, x in zip(prompts, prefixes, strict=True)]

    # --- texts ------------------------------------------------------------------------------------------------------

    def evidence_text(
        self, question: str, visuals: Sequence[VisualTokens] | Mapping[int, VisualTokens], boxes: Sequence[Box]
    ) -> str:
        """Boxes as the model writes them, each with the number of its image if the question has several.

        Args:
            question: the question, which numbers its images.
            visuals: the visual tokens of the images by place, from 0; those with a box are enough.
            boxes: at least one.

        Raises:
            ValueError: as `format_box_list` and `Backbone.write_box`.
        """
        numbers = image_numbers(question)
        rows = [self.backbone.write_box(box, visuals[box.image - 1], self.spec.coordinates) for box in boxes]
        if len(numbers) > 1:
            rows = [[str(numbers[box.image - 1]), *row] for box, row in zip(boxes, rows, strict=True)]
        return format_box_list(rows)

    def read_localization(self, query: Query, completion: Completion) -> Rollout:
        """The boxes and the answer in a completion of the localization branch."""
        readers = [self.backbone.box_reader(visual, self.spec.coordinates) for visual in query.scan.visuals]
        by_number = dict(zip(image_numbers(query.question), enumerate(readers, start=1), strict=True))
        read_box = readers[0] if len(readers) == 1 else by_number
        return Rollout(completion, parse_localization(completion.text, query.options, read_box, written=query.written))

    def read_reasoning(self, query: Query, completion: Completion) -> Rollout:
        """The thought and the answer in a completion of the reasoning branch."""
        return Rollout(completion, parse_reasoning(completion.text, query.options, query.written))
