"""`SparseVLM`: one policy used twice. Encode an image once, then ask as often as you like."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitos.backbones import Backbone, load_backbone
from vitos.backbones.companions import write_companions
from vitos.backbones.evidence_head import load_head
from vitos.core.geometry import Box
from vitos.core.prompt import Prompt
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.core.stopwatch import Stopwatch
from vitos.data.files import set_default_modes
from vitos.data.images import ImageFacts, load_image, load_image_facts
from vitos.engines.base import Completion, Sampling, count_run
from vitos.engines.torch_engine import TorchEngine
from vitos.policy import run
from vitos.policy.branches import Branches
from vitos.policy.locate import resolve_model_path
from vitos.policy.plans import Limits, Plan, get_plan
from vitos.policy.prefixes import with_prefixes
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Finding, Query, Rollout, Scan


class SparseVLM:
    """A vision-language model with the two branches of dual-stream reasoning.

    >>> from PIL import Image
    >>> from vitos import SparseVLM
    >>> vlm = SparseVLM.from_pretrained("nano", device="cpu")
    >>> scan = vlm.encode(Image.new("RGB", (128, 128), "gray"))  # the vision encoder runs once
    >>> finding = vlm.ask(scan, "What is the finding in the left lung?\\nA. nodule\\nB. cyst")
    >>> finding.answer in ("A", "B", None), 0 < finding.kept_ratio <= 1
    (True, True)

    Args:
        backbone: the loaded model.
        spec: prompts, coordinates, keep rule and fusion; None for the defaults.

    Raises:
        ValueError: if the spec contradicts its plan.
    """

    def __init__(self, backbone: Backbone, spec: VitosSpec | None = None) -> None:
        self.backbone = backbone
        self.spec = spec or VitosSpec()
        self.engine = TorchEngine(backbone)
        self._check_spec()

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
            path: folder, hub id, or the name of an embedded model such as "nano".
            device: the device of the model; None for the GPU if there is one.
            spec: a spec to use instead of the checkpoint's.
            options: options of `load_backbone`, such as dtype and max_pixels.

        Raises:
            ValueError: for an unknown family, or if the image processor's geometry differs from that of the training.
        """
        where = resolve_model_path(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        saved = VitosSpec.load(where)
        backbone = load_backbone(where, device=device, **options)
        if saved is not None:
            saved.check_geometry(backbone, str(where))
        if saved is not None and saved.evidence_head is not None:
            hidden = int(backbone.model.config.get_text_config().hidden_size)
            rule = saved.evidence_head
            head = load_head(Path(where) / rule.file, rule.kind, hidden)
            backbone.evidence_head = head.to(backbone.device)
            if spec is not None and spec.evidence_head is None:
                spec = dataclasses.replace(spec, evidence_head=saved.evidence_head)
        return cls(backbone, spec or saved)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write an ordinary Hugging Face checkpoint plus `vitos.json`.

        Args:
            folder: the folder of the checkpoint; made if it does not exist.
            state_dict: weights to write instead of the model's, for models whose weights are sharded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.model.save_pretrained(folder, state_dict=state_dict)
        self.backbone.tokenizer.save_pretrained(folder)
        self.save_beside(folder)

    def save_beside(self, folder: Path) -> None:
        """Write what belongs to a checkpoint besides model and tokenizer, and let everybody read the weights whom the
        umask lets.

        These are all files of the base checkpoint, the image processor, any evidence head, and `vitos.json`.
        """
        self.backbone.image_processor.save_pretrained(folder)
        write_companions(self.backbone.companions, self.backbone.image_processor, folder)
        if self.backbone.evidence_head is not None:
            self.backbone.evidence_head.save(folder)
        self.spec.save(folder, self.backbone)
        set_default_modes(folder)

    def with_spec(self, **changes: Any) -> SparseVLM:
        """The same model with parts of the spec changed, such as `fusion=Fusion("none")`.

        Raises:
            ValueError: if the spec contradicts its plan.
        """
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, **changes)
        other._check_spec()
        return other

    @property
    def branches(self) -> Branches:
        """Prompts and parsers of both branches."""
        return Branches(self.backbone, self.spec)

    @property
    def plan(self) -> Plan:
        """The spec's plan."""
        return get_plan(self.spec.plan)

    def _check_spec(self) -> None:
        if problem := self.plan.spec_problem(self.spec):
            raise ValueError(problem)

    # --- images and questions ---------------------------------------------------------------------------------------

    def encode(
        self,
        *images: Image.Image | str | Path,
        plan: str | None = None,
        lead: str = "",
        watch: Stopwatch | None = None,
    ) -> Scan:
        """Encode the part that questions about the image(s) share.

        These are the visual tokens, and the keys and values of system text and image.

        Args:
            images: pictures, or files as records name them.
            plan: name of the plan that `ask` will follow; None for the spec's. Plans other than coarse can use each
                other's scans.
            lead: text with one `<image>` per image in front of questions (see `Scan`).
            watch: a stopwatch for the spans "vision" and "prefix".

        Raises:
            ValueError: if the family cannot follow the plan.
        """
        method, watch = get_plan(plan or self.spec.plan), watch or Stopwatch()
        if refusal := method.refusal(self.backbone):
            raise ValueError(refusal)
        facts: tuple[ImageFacts, ...] = ()
        if any(isinstance(image, Image.Image) for image in images):
            opened = [i if isinstance(i, Image.Image) else load_image(Path(i)) for i in images]
            pictures = tuple(picture.convert("RGB") for picture in opened)
        else:
            loaded = [load_image_facts(Path(str(image))) for image in images]
            pictures, facts = tuple(picture for picture, _ in loaded), tuple(fact for _, fact in loaded)
        with watch.span("vision"):
            scan = dataclasses.replace(method.scan(self.branches, pictures), lead=lead)
        watch.count("vision", sum(v.grid.num_tokens for v in scan.visuals))
        if facts:
            scan = scan.of_files(facts)
        if images and not self.backbone.cache_refusal:
            query = Query.about(scan, lead or IMAGE_PLACEHOLDER * len(images))
            layers = method.shared_layers(self.spec)
            scan = with_prefixes(self.branches, self.engine, [query], watch, layers)[0].scan
        return scan

    def ask(
        self,
        scan: Scan,
        question: str,
        *,
        boxes: Sequence[Box] | None = None,
        budget: float | None = None,
        plan: str | None = None,
        limits: Limits | None = None,
    ) -> Finding:
        """Answer one question; greedy.

        Args:
            scan: the image(s), from `encode`.
            question: the text of the question, with its options if it has any.
            boxes: evidence to use instead of the model's, in fractions of the original image; the model then does not
                localize.
            budget: share of the visual tokens to keep, in (0, 1]; evidence is cut or widened to it.
            plan: name of the plan to follow; None for the spec's.
            limits: length limits of the texts.

        Raises:
            ValueError: if the family cannot follow the plan, the scan was made for another plan, or the plan cannot
                use boxes or a budget.
        """
        return self.answer([Query.about(scan, question, boxes=boxes, budget=budget)], plan=plan, limits=limits)[0]

    def ask_many(
        self,
        scans: Sequence[Scan],
        questions: Sequence[str],
        *,
        boxes: Sequence[Sequence[Box] | None] | None = None,
        budget: float | None = None,
        plan: str | None = None,
        limits: Limits | None = None,
    ) -> list[Finding]:
        """`ask` for several questions together, each with its scan and its boxes."""
        rows = zip(scans, questions, boxes or [None] * len(scans), strict=True)
        queries = [Query.about(scan, question, boxes=given, budget=budget) for scan, question, given in rows]
        return self.answer(queries, plan=plan, limits=limits)

    def stream(
        self,
        scan: Scan,
        question: str,
        *,
        boxes: Sequence[Box] | None = None,
        budget: float | None = None,
        plan: str | None = None,
        limits: Limits | None = None,
    ) -> Generator[run.Piece, None, Finding]:
        """`ask` with the text piece by piece: yields `Piece`s and returns the finding (`finding = yield from …`)."""
        method, watch = get_plan(plan or self.spec.plan), Stopwatch()
        query = Query.about(scan, question, boxes=boxes, budget=budget)
        outcome = yield from run.stream(method, self.branches, self.engine, query, limits or Limits(), watch)
        return run.finding(method, query, outcome, watch)

    def answer(
        self,
        queries: Sequence[Query],
        *,
        plan: str | None = None,
        limits: Limits | None = None,
        watch: Stopwatch | None = None,
    ) -> list[Finding]:
        """Answer questions together by a plan, by default the spec's; the engine runs them sorted by length.

        Raises:
            ValueError: as in `ask`.
        """
        method, watch = get_plan(plan or self.spec.plan), watch or Stopwatch()
        outcomes = run.answer(method, self.branches, self.engine, queries, limits or Limits(), watch)
        return [run.finding(method, query, outcome, watch) for query, outcome in zip(queries, outcomes, strict=True)]

    # --- batches ----------------------------------------------------------------------------------------------------

    def localize(
        self,
        queries: Sequence[Query],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None = None,
        watch: Stopwatch | None = None,
        prompts: Sequence[Prompt] | None = None,
    ) -> list[list[Rollout]]:
        """The localization branch on all visual tokens: one rollout per query and seed; without seeds, one per query.

        Args:
            queries: the questions.
            sampling: length and temperature.
            seeds: the seeds of each question's rollouts.
            watch: a stopwatch for the spans "localize_prefill" and "localize_decode".
            prompts: the prompts from `Branches.localize_prompt`, if the caller has them already.
        """
        branches = self.branches
        prompts = prompts or [branches.localize_prompt(query) for query in queries]
        sampled = self._sample(queries, prompts, sampling, seeds, watch, "localize")
        return [[branches.read_localization(q, c) for c in row] for q, row in zip(queries, sampled, strict=True)]

    def reason(
        self,
        queries: Sequence[Query],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None = None,
        watch: Stopwatch | None = None,
    ) -> list[list[Rollout]]:
        """The reasoning branch behind prompts that a plan or a selector has made, one rollout per prompt and seed."""
        branches = self.branches
        sampled = self._sample(queries, prompts, sampling, seeds, watch, "reason")
        return [[branches.read_reasoning(q, c) for c in row] for q, row in zip(queries, sampled, strict=True)]

    def with_prefixes(self, queries: Sequence[Query], watch: Stopwatch | None = None) -> list[Query]:
        """The same questions, with system text and image run once per scan (`vitos.policy.prefixes`)."""
        return with_prefixes(self.branches, self.engine, queries, watch or Stopwatch())

    def _sample(
        self,
        queries: Sequence[Query],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None,
        watch: Stopwatch | None,
        branch: str,
    ) -> list[list[Completion]]:
        clock, seeds = watch or Stopwatch(), seeds or [[0]] * len(prompts)
        prefixes = self.branches.known_prefixes(queries, prompts)
        rows = self.engine.sample(prompts, sampling, seeds, clock.spans(branch), prefixes)
        count_run(clock, branch, prompts, prefixes, rows)
        return rows
