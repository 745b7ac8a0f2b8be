"""`SparseVLM` as a model of lmms-eval (extra `lmms-eval`): any of its image tasks, answered from sparse tokens.

    python -m lmms_eval --model vitos --model_args pretrained=CHECKPOINT,tokens=sparse --tasks slake_en --batch_size 8

lmms-eval finds the model through the entry point `lmms_eval.models`. The task's scorer gets the text of the `<answer>`
block, or "" if no answer can be read; lenient scorers never see the thought before it. The task's own limit on new
tokens is meant for bare answers and is not used; `max_tokens` limits each branch instead.

It runs in one process and answers questions with at least one image and no video or sound; others are refused by name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vitos.core.record import IMAGE_PLACEHOLDER
from vitos.core.response import read_answer_text
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling, derive_seed
from vitos.policy.plans.base import Reasoning
from vitos.policy.plans.dense import Dense
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM

_log = logging.getLogger(__name__)


def manifest() -> Any:
    """The entry point of lmms-eval: the model `vitos`, in its chat interface."""
    # Importing the registry loads all entry points, this one included: not while this module is half imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vitos", chat_class_path=f"{__name__}.SparseModel")


class SparseModel(lmms):
    """The model as lmms-eval calls it.

    Args:
        pretrained: folder, hub id, or "nano".
        tokens: whether to answer from the tokens of the model's own boxes ("sparse") or from all of them ("dense").
        batch_size: number of questions decoded together.
        max_tokens: longest response of each branch.
        device: device of the model; None: the GPU if there is one.

    Raises:
        ValueError: for other values of `tokens`, for a checkpoint whose plan takes no masks, or in one of several
            processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        tokens: Literal["sparse", "dense"] = "sparse",
        batch_size: int | str = 8,
        max_tokens: int = 256,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        # lmms-eval hands these to every model, whether it asks for them or not.
        if unexpected := {key for key in unknown if key not in ("max_batch_size",)}:
            raise ValueError(f"model_args holds {', '.join(sorted(unexpected))}, which the model vitos does not know")
        if tokens not in ("sparse", "dense"):
            raise ValueError(f"tokens must be sparse or dense, got {tokens!r}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the model vitos runs in one process; start lmms_eval without accelerate launch")
        self.policy = SparseVLM.from_pretrained(pretrained, device=device)
        if not self.policy.plan.takes_masks:
            raise ValueError(
                f"the model vitos answers by plan two_pass or gather here; {pretrained} has {self.policy.plan.name}"
            )
        self.tokens = tokens
        self.batch_size = int(batch_size)
        self.max_tokens = int(max_tokens)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; logs how many tokens were kept and what could not be read."""
        answers: list[str] = []
        kept: list[float] = []
        fallbacks = 0
        starts = range(0, len(requests), self.batch_size)
        for start in tqdm(starts, desc="vitos", unit="batch", disable=not requests):
            batch = requests[start : start + self.batch_size]
            queries = [self._query(request) for request in batch]
            ready = self._ready(queries)
            kept += [one.kept.ratio for one in ready]
            fallbacks += sum(one.kept.fallback for one in ready)
            sampling = Sampling(self.max_tokens, _temperature(batch))
            seeds = [[derive_seed("lmms-eval", request.args[4], request.args[3])] for request in batch]
            rows = self.policy.reason(queries, [one.prompt for one in ready], sampling, seeds)
            texts = [row[0].completion.text for row in rows]
            answers += [read_answer_text(text) or "" for text in texts]
        if answers:
            _log.warning(
                "%d questions: %.1f %% of the visual tokens kept, %d without boxes (answered from all tokens), "
                "%d without an answer",
                *(len(answers), 100 * sum(kept) / len(kept), fallbacks, answers.count("")),
            )
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the model was not trained for the likelihood of an answer without its thought."""
        raise NotImplementedError("the model vitos generates answers; choose a task of type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("the model vitos answers in one round; choose a task of type generate_until")

    def _query(self, request: Instance) -> Query:
        _, to_messages, _, doc_id, task, split = request.args
        text, images = read_messages(to_messages(self.task_dict[task][split][doc_id]), f"{task}, {split}, {doc_id}")
        return Query.about(self.policy.encode(*images), text)

    def _ready(self, queries: Sequence[Query]) -> list[Reasoning]:
        """The prompt of the reasoning branch for each question."""
        branches, watch = self.policy.branches, Stopwatch()
        if self.tokens == "dense":
            return [Dense("dense").reason(branches, query, [()], watch)[0] for query in queries]
        located = self.policy.localize(queries, Sampling(self.max_tokens))
        return [
            self.policy.plan.reason(branches, query, [rollout.response.boxes], watch)[0]
            for query, (rollout,) in zip(queries, located, strict=True)
        ]


def read_messages(messages: Sequence[dict[str, Any]], where: str) -> tuple[str, list[Image.Image]]:
    """From a task's chat to the question, with `<image>` where its images are, and the images.

    Args:
        messages: turns of the chat.
        where: name of the question in errors.

    Raises:
        ValueError: for anything but text and images of a system or user, or if there is no image.
    """
    parts: list[str] = []
    images: list[Image.Image] = []
    for message in messages:
        if message["role"] not in ("system", "user"):
            raise ValueError(f"{where}: has a turn of {message['role']!r}; the model vitos answers single questions")
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                # The place of an image is that of its part; a placeholder in the text belongs to another model.
                parts.append(part["text"].replace(IMAGE_PLACEHOLDER, ""))
            elif part["type"] == "image" and isinstance(part["url"], Image.Image):
                parts.append(IMAGE_PLACEHOLDER)
                images.append(part["url"].convert("RGB"))
            else:
                raise ValueError(
                    f"{where}: holds a part of type {part['type']!r}; the model vitos reads text and images"
                )
    if not images:
        raise ValueError(f"{where}: has no image; leave text-only questions out")
    return "".join(parts), images


def _temperature(batch: Sequence[Instance]) -> float:
    """The batch's temperature, 0 if the task does not sample; a task has one for all its questions."""
    found = {float(r.args[2].get("temperature") or 0.0) if r.args[2].get("do_sample", True) else 0.0 for r in batch}
    if len(found) != 1:
        raise ValueError(f"one batch asks for several temperatures ({sorted(found)}); run these tasks one by one")
    return found.pop()
