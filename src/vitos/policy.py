"""`SparseVLM`: one policy used twice. Encode an image once, then localize, reason and ask as often as you like.

    vlm = SparseVLM.from_pretrained("nano")
    scan = vlm.encode("slice.png")
    finding = vlm.ask(scan, "<image>What is the finding in the left lung?\\nA. nodule\\nB. cyst")
    finding.answer, finding.boxes, finding.kept_ratio

A scan serves any number of questions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitos.backbones import Backbone, load_backbone
from vitos.data.images import ImageFacts, load_image, load_image_facts
from vitos.data.record import IMAGE_PLACEHOLDER, AnswerKind, parse_options
from vitos.engines.base import Completion, Sampling
from vitos.engines.torch_engine import TorchEngine
from vitos.geometry import BoolArray, Box
from vitos.nano import resolve_model_path
from vitos.prompt import Prompt, VisualTokens
from vitos.response import Response, parse_localization, parse_reasoning
from vitos.sparsify import Selection, select
from vitos.spec import VitosSpec


@dataclass(frozen=True, slots=True)
class Scan:
    """The visual tokens of a question's image(s), computed once. Evidence boxes refer to the first image.

    Attributes:
        images: how each was opened (frame, slice, window, crop); empty where pictures were given, not files.
    """

    visuals: tuple[VisualTokens, ...]
    images: tuple[ImageFacts, ...] = ()

    def of_files(self, images: Sequence[ImageFacts]) -> Scan:
        """The scan of pictures that were opened so: their tokens laid over the stored images."""
        placed = (v.within(facts.shown) for v, facts in zip(self.visuals, images, strict=True))
        return Scan(tuple(placed), tuple(images))


@dataclass(frozen=True, slots=True)
class Query:
    """A question, with one `<image>` for each image of its scan, options inline; `kind` says what answers it."""

    scan: Scan
    question: str
    kind: AnswerKind = "letter"

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
        answer: option letter, or None: no answer could be read.
        thought: the reasoning branch's thought.
        boxes: evidence in fractions of the original image.
        kept: kept visual tokens of the first image, bool (N,); `fallback` if no box could be read and all are kept.
        seconds: time of each stage: vision is in the scan's making, not here.
        images: how the scan's files were opened (frame, slice, window, crop).
    """

    answer: str | None
    thought: str | None
    boxes: tuple[Box, ...]
    kept: BoolArray
    fallback: bool
    localization: Rollout
    reasoning: Rollout
    seconds: dict[str, float]
    images: tuple[ImageFacts, ...] = ()

    @property
    def kept_ratio(self) -> float:
        """Share of the first image's visual tokens that the answer was given from, in (0, 1]."""
        return float(self.kept.mean())


@dataclass(slots=True)
class Stopwatch:
    """Adds up wall-clock seconds by stage; waits for the GPU, so that a stage pays for its own kernels."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class SparseVLM:
    """A vision-language model with the two branches of dual-stream reasoning.

    Args:
        backbone: the loaded model.
        spec: prompts, coordinates, keep rule and fusion; by default those of an ordinary model.
    """

    def __init__(self, backbone: Backbone, spec: VitosSpec | None = None) -> None:
        self.backbone = backbone
        self.spec = spec or VitosSpec()
        self.engine = TorchEngine(backbone)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        spec: VitosSpec | None = None,
        **options: Any,
    ) -> SparseVLM:
        """Load a checkpoint with its `vitos.json`, or an ordinary model of a known family with the default spec.

        Args:
            path: folder, hub id, or "nano" for the embedded model.
            device: by default the GPU if there is one.
            spec: used instead of the checkpoint's own.
            options: of `load_backbone`, such as dtype and max_pixels.

        Raises:
            ValueError: for an unknown family, or if the image processor's geometry is not that of the training.
        """
        where = resolve_model_path(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        saved = VitosSpec.load(where)
        backbone = load_backbone(where, device=device, **options)
        if saved is not None:
            saved.check_geometry(backbone, str(where))
        return cls(backbone, spec or saved)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write an ordinary Hugging Face checkpoint plus `vitos.json`.

        Args:
            state_dict: weights to write instead of the model's own, where those are sharded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.model.save_pretrained(folder, state_dict=state_dict)
        self.backbone.tokenizer.save_pretrained(folder)
        self.backbone.image_processor.save_pretrained(folder)
        self.spec.save(folder, self.backbone)

    def with_spec(self, **changes: Any) -> SparseVLM:
        """The same model with parts of the spec changed, such as `fusion=Fusion("none")`."""
        other = SparseVLM(self.backbone, dataclasses.replace(self.spec, **changes))
        other.engine = self.engine
        return other

    # --- one image, one question ------------------------------------------------------------------------------------

    def encode(self, *images: Image.Image | str | Path) -> Scan:
        """Visual tokens of the image(s) that one question is about: pictures, or files as records name them."""
        if any(isinstance(image, Image.Image) for image in images):
            pictures = [i if isinstance(i, Image.Image) else load_image(Path(i)) for i in images]
            return self.encode_many([[picture.convert("RGB") for picture in pictures]])[0]
        loaded = [load_image_facts(Path(str(image))) for image in images]
        scan = self.encode_many([[picture for picture, _ in loaded]])[0]
        return scan.of_files([facts for _, facts in loaded])

    def ask(self, scan: Scan, question: str, max_tokens: int = 256) -> Finding:
        """Localize, keep the evidence's tokens, answer from them; greedy."""
        if IMAGE_PLACEHOLDER not in question:
            question = IMAGE_PLACEHOLDER * len(scan.visuals) + question
        query, watch = Query(scan, question), Stopwatch()
        ((localization,),) = self.localize([query], Sampling(max_tokens), watch=watch)
        with watch.stage("sparsify"):
            selection = self.select(query, localization.response)
        ((reasoning,),) = self.reason([query], [selection], Sampling(max_tokens), watch=watch)
        return Finding(
            answer=reasoning.response.answer,
            thought=reasoning.response.thought,
            boxes=localization.response.boxes,
            kept=selection.mask,
            fallback=selection.fallback,
            localization=localization,
            reasoning=reasoning,
            seconds=watch.seconds,
            images=scan.images,
        )

    # --- batches ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_many(self, images: Sequence[Sequence[Image.Image]]) -> list[Scan]:
        """One scan for every sequence of RGB images.

        Every image is encoded alone: the last bits of a matrix product can depend on the rows beside it, and the
        tokens of an image must not depend on its batch, or on whether they were encoded now or for the cache.
        """
        return [Scan(tuple(self.backbone.encode([image])[0] for image in group)) for group in images]

    def localize(
        self,
        queries: Sequence[Query],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None = None,
        watch: Stopwatch | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> list[list[Rollout]]:
        """The localization branch on all visual tokens: for every query one rollout a seed (one, if no seeds).

        Args:
            prompts: those of `localize_prompts`, where the caller has them already.
        """
        prompts = prompts or self.localize_prompts(queries)
        out = []
        for query, completions in zip(queries, self._sample(prompts, sampling, seeds, watch, "localize"), strict=True):
            read_box = self.backbone.box_reader(query.scan.visuals[0], self.spec.coordinates)
            out.append([Rollout(c, parse_localization(c.text, query.options, read_box)) for c in completions])
        return out

    def select(self, query: Query, response: Response) -> Selection:
        """Visual tokens of the first image that a localization's boxes keep."""
        return select(query.scan.visuals[0].grid, response.boxes, self.spec.keep)

    def reason(
        self,
        queries: Sequence[Query],
        selections: Sequence[Selection | None],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None = None,
        watch: Stopwatch | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> list[list[Rollout]]:
        """The reasoning branch on the selected tokens (None: all of them), one rollout a seed.

        Args:
            prompts: those of `reason_prompts`, where the caller has them already.
        """
        prompts = prompts or self.reason_prompts(queries, selections)
        sampled = self._sample(prompts, sampling, seeds, watch, "reason")
        return [
            [Rollout(c, parse_reasoning(c.text, query.options)) for c in completions]
            for query, completions in zip(queries, sampled, strict=True)
        ]

    def localize_prompts(self, queries: Sequence[Query]) -> list[Prompt]:
        """Dense prompts of the localization branch."""
        return [
            self.backbone.build_prompt(self.spec.localize_text(q.question, q.kind), q.scan.visuals) for q in queries
        ]

    def reason_prompts(self, queries: Sequence[Query], selections: Sequence[Selection | None]) -> list[Prompt]:
        """Prompts of the reasoning branch: outside tokens fused into the kept ones, further images whole."""
        prompts = []
        built: dict[int, Prompt] = {}  # a question stands here once for each of its localizations
        for query, selection in zip(queries, selections, strict=True):
            if id(query) not in built:
                text = self.spec.reason_text(query.question, query.kind)
                built[id(query)] = self.backbone.build_prompt(text, query.scan.visuals)
            dense = built[id(query)]
            if selection is None or selection.mask.all():
                prompts.append(dense)
                continue
            whole = [torch.ones(v.grid.num_tokens, dtype=torch.bool) for v in query.scan.visuals[1:]]
            masks = [torch.from_numpy(selection.mask), *whole]
            prompts.append(dense.sparse(masks, self.spec.fusion, renumber=self.spec.positions == "renumber"))
        return prompts

    def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None,
        watch: Stopwatch | None,
        branch: str,
    ) -> list[list[Completion]]:
        if seeds is None:
            seeds = [[0]] * len(prompts)
        clock = watch or Stopwatch()
        return self.engine.sample(prompts, sampling, seeds, lambda move: clock.stage(f"{branch}_{move}"))
