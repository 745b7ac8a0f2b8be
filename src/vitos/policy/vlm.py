"""`SparseVLM`: one policy used twice. Encode an image once, then localize, reason and ask as often as you like.

    vlm = SparseVLM.from_pretrained("nano")
    scan = vlm.encode("slice.png")
    finding = vlm.ask(scan, "<image>What is the finding in the left lung?\\nA. nodule\\nB. cyst")
    finding.answer, finding.boxes, finding.kept_ratio

A scan serves any number of questions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vitos.backbones import Backbone, load_backbone
from vitos.core.names import PlanName
from vitos.core.prompt import Prompt
from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.core.response import Response, parse_localization, parse_reasoning, read_answer_text
from vitos.core.sparsify import Selection, select
from vitos.core.stopwatch import Stopwatch
from vitos.data.images import ImageFacts, load_image, load_image_facts
from vitos.engines.base import Completion, Sampling
from vitos.engines.prefix import Prefix, count_run
from vitos.engines.torch_engine import TorchEngine
from vitos.nano import resolve_model_path
from vitos.policy import plans
from vitos.policy.plans import Limits, Piece
from vitos.policy.spec import VitosSpec
from vitos.policy.types import Finding, Query, Rollout, Scan

__all__ = ["Finding", "Limits", "Piece", "Query", "Rollout", "Scan", "SparseVLM", "Stopwatch"]


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
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, **changes)
        return other

    # --- images and questions ---------------------------------------------------------------------------------------

    def encode(
        self,
        *images: Image.Image | str | Path,
        plan: PlanName | None = None,
        watch: Stopwatch | None = None,
    ) -> Scan:
        """What questions about the image(s) share: visual tokens, and the keys and values of system text and image.

        Args:
            images: pictures, or files as records name them.
            plan: what `ask` will follow; by default the spec's. All but coarse can use one another's scans.
            watch: gets the stages "vision" and "prefix".

        Raises:
            ValueError: if the family cannot follow the plan.
        """
        method, watch = plans.PLANS[plan or self.spec.plan], watch or Stopwatch()
        if refusal := method.refusal(self.backbone):
            raise ValueError(refusal)
        facts: tuple[ImageFacts, ...] = ()
        if any(isinstance(image, Image.Image) for image in images):
            opened = [i if isinstance(i, Image.Image) else load_image(Path(i)) for i in images]
            pictures = tuple(picture.convert("RGB") for picture in opened)
        else:
            loaded = [load_image_facts(Path(str(image))) for image in images]
            pictures, facts = tuple(picture for picture, _ in loaded), tuple(fact for _, fact in loaded)
        with watch.stage("vision"):
            scan = method.scan(self, pictures)
        watch.count("vision", sum(v.grid.num_tokens for v in scan.visuals))
        if facts:
            scan = scan.of_files(facts)
        if images and not self.backbone.cache_refusal:
            (query,) = self.with_prefixes([Query(scan, IMAGE_PLACEHOLDER * len(images))], watch)
            scan = query.scan
        return scan

    def ask(
        self,
        scan: Scan,
        question: str,
        max_tokens: int = 256,
        *,
        plan: PlanName | None = None,
        limits: Limits | None = None,
    ) -> Finding:
        """Answer one question by a plan, by default the spec's; greedy.

        Args:
            max_tokens: of each branch, where no `limits` are given.

        Raises:
            ValueError: if the family cannot follow the plan, or the scan was made for another.
        """
        return self.ask_many([scan], [question], max_tokens, plan=plan, limits=limits)[0]

    def ask_many(
        self,
        scans: Sequence[Scan],
        questions: Sequence[str],
        max_tokens: int = 256,
        *,
        plan: PlanName | None = None,
        limits: Limits | None = None,
    ) -> list[Finding]:
        """`ask` for several questions together, each about its scan; the engine runs them sorted by length."""
        policy, watch = self.with_spec(plan=plan or self.spec.plan), Stopwatch()
        queries = [Query.about(scan, question) for scan, question in zip(scans, questions, strict=True)]
        outcomes = plans.answer(policy, queries, limits or Limits(max_tokens, max_tokens), watch)
        return [policy.finding(query, outcome, watch) for query, outcome in zip(queries, outcomes, strict=True)]

    def stream(
        self,
        scan: Scan,
        question: str,
        max_tokens: int = 256,
        *,
        plan: PlanName | None = None,
        limits: Limits | None = None,
    ) -> Generator[Piece, None, Finding]:
        """`ask`, its text piece by piece: yields `Piece`s, returns the finding (`finding = yield from …`)."""
        policy, watch, query = self.with_spec(plan=plan or self.spec.plan), Stopwatch(), Query.about(scan, question)
        outcome = yield from plans.stream(policy, query, limits or Limits(max_tokens, max_tokens), watch)
        return policy.finding(query, outcome, watch)

    def finding(self, query: Query, outcome: plans.Outcome, watch: Stopwatch) -> Finding:
        """What a plan's outcome says to the asker; the policy's spec holds the plan."""
        response = outcome.reasoning.response
        return Finding(
            answer=response.answer if query.kind == "letter" else read_answer_text(response.text),
            thought=response.thought,
            boxes=outcome.localization.response.boxes if outcome.localization else (),
            kept=outcome.mask,
            fallback=bool(outcome.fallback),
            localization=outcome.localization,
            reasoning=outcome.reasoning,
            seconds=watch.seconds,
            images=query.scan.images,
            plan=self.spec.plan,
            grid=outcome.grid,
            fallback_reason=outcome.fallback,
            tokens=watch.tokens,
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
        sampled = self._sample(prompts, self.known_prefixes(queries, prompts), sampling, seeds, watch, "localize")
        return [[self.read_localization(q, c) for c in row] for q, row in zip(queries, sampled, strict=True)]

    def read_localization(self, query: Query, completion: Completion) -> Rollout:
        """What a completion of the localization branch says."""
        read_box = self.backbone.box_reader(query.scan.visuals[0], self.spec.coordinates)
        return Rollout(completion, parse_localization(completion.text, query.options, read_box))

    def read_reasoning(self, query: Query, completion: Completion) -> Rollout:
        """What a completion of the reasoning branch says."""
        return Rollout(completion, parse_reasoning(completion.text, query.options))

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
        sampled = self._sample(prompts, self.known_prefixes(queries, prompts), sampling, seeds, watch, "reason")
        return [[self.read_reasoning(q, c) for c in row] for q, row in zip(queries, sampled, strict=True)]

    def localize_prompts(self, queries: Sequence[Query]) -> list[Prompt]:
        """Dense prompts of the localization branch."""
        return [
            self.backbone.build_prompt(self.spec.localize_text(q.question, q.kind), q.scan.visuals) for q in queries
        ]

    def reason_prompts(self, queries: Sequence[Query], selections: Sequence[Selection | None]) -> list[Prompt]:
        """Prompts of the reasoning branch, further images whole.

        Outside tokens are fused into the kept ones or, under plan gather, hidden from what follows the image.
        """
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
            if self.spec.plan == "gather":
                prompts.append(dense.gather(masks))
            else:
                prompts.append(dense.sparse(masks, self.spec.fusion, renumber=self.spec.positions == "renumber"))
        return prompts

    def with_prefixes(self, queries: Sequence[Query], watch: Stopwatch | None = None) -> list[Query]:
        """The same questions, system text and image run for every distinct scan (stage "prefix").

        Raises:
            ValueError: for a family whose cache does not hold every token.
        """
        watch, known, out = watch or Stopwatch(), {}, []
        for query, prompt in zip(queries, self.localize_prompts(queries), strict=True):
            scan, head = query.scan, prompt.head(prompt.prefix_length)
            if scan.prefix is None or not scan.prefix.covers(prompt, self.backbone.model):
                key = (id(scan), tuple(head.input_ids.tolist()))
                if key not in known:
                    with watch.stage("prefix"):
                        known[key] = self.engine.prefix(head)
                    watch.count("prefix", len(head))
                scan = dataclasses.replace(scan, prefix=known[key])
            out.append(dataclasses.replace(query, scan=scan))
        return out

    def known_prefixes(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> list[Prefix | None]:
        """For every prompt its scan's prefix, where it begins with that."""
        prefixes = [query.scan.prefix for query in queries]
        model = self.backbone.model
        return [x if x and x.covers(p, model) else None for p, x in zip(prompts, prefixes, strict=True)]

    def complete(self, request: plans.Request, watch: Stopwatch) -> list[Completion]:
        """One greedy completion for every prompt of a plan's request."""
        rows = self._sample(request.prompts, request.prefixes, request.sampling, None, watch, request.branch)
        return [row[0] for row in rows]

    def _sample(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Prefix | None],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]] | None,
        watch: Stopwatch | None,
        branch: str,
    ) -> list[list[Completion]]:
        clock, seeds = watch or Stopwatch(), seeds or [[0]] * len(prompts)
        rows = self.engine.sample(prompts, sampling, seeds, lambda move: clock.stage(f"{branch}_{move}"), prefixes)
        count_run(clock, branch, prompts, prefixes, rows)
        return rows
