"""Training steps of `DualStreamTrainer` to be measured, as they are and with sharing switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.train_shapes import question_text
from benchmarks.train_turns import Job, Meter, Turns, noise
from vitos.core.prompt import Prompt
from vitos.core.record import Record
from vitos.engines.base import Completion, Sampling, Span
from vitos.engines.prefix import Prefix
from vitos.engines.torch_engine import NARROWEST_SCORED, Scores, TorchEngine, chunk_by_tokens, untimed
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.trainer import DualStreamTrainer


class MeteredEngine(TorchEngine):
    """The engine as it is, measured."""

    meter: Meter

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        span: Span = untimed,
        prefixes: Sequence[Prefix | None] | None = None,
    ) -> list[list[Completion]]:
        self.meter.prompt_tokens += sum(map(len, prompts))
        with self.meter.span("sample"):
            return super().sample(prompts, sampling, seeds, span, prefixes)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        with self.meter.span("score"):
            scores = super().score(prompts, completions, temperature, entropy)
        self.meter.prompt_tokens += scores.prompt_tokens_run
        return scores


class OwnPromptsEngine(MeteredEngine):
    """Every completion with a prompt of its own, in sampling and in scoring."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        span: Span = untimed,
        prefixes: Sequence[Prefix | None] | None = None,
    ) -> list[list[Completion]]:
        repeated = [prompt for prompt, row in zip(prompts, seeds, strict=True) for _ in row]
        flat = iter(super().sample(repeated, sampling, [[seed] for row in seeds for seed in row], span))
        return [[next(flat)[0] for _ in row] for row in seeds]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        repeated = [prompt for prompt, row in zip(prompts, completions, strict=True) for _ in row]
        return super().score(repeated, [[ids] for row in completions for ids in row], temperature, entropy)

    def score_batches(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
        sizes = [(len(ids), len(p) + max(map(len, ids))) for p, ids in zip(prompts, completions, strict=True)]
        return chunk_by_tokens(sizes, self.max_batch_tokens, NARROWEST_SCORED)


class UnsharedEngine(OwnPromptsEngine):
    """Localizations, too, are scored once for every pair that they stand in: K times each, as the loss is written.

    Attributes:
        num_reasonings: K.
    """

    num_reasonings: int = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._samplings, self._localizing = 0, set[int]()

    def sample(self, prompts: Sequence[Prompt], *args: Any, **kwargs: Any) -> list[list[Completion]]:
        if self._samplings % 2 == 0:  # a step samples localizations, then reasonings
            self._localizing = {id(prompt) for prompt in prompts}
        self._samplings += 1
        return super().sample(prompts, *args, **kwargs)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        if not all(id(prompt) in self._localizing for prompt in prompts):
            return super().score(prompts, completions, temperature, entropy)
        times = self.num_reasonings
        scores = super().score(
            prompts, [[ids for ids in row for _ in range(times)] for row in completions], temperature
        )
        # The mean of equal numbers is that number, and its gradient the sum of their K-th parts.
        logprobs = scores.logprobs.unflatten(0, (-1, times)).mean(1)
        return Scores(logprobs, scores.mask[::times], scores.prompt_tokens_run)


ENGINES = {"shared": MeteredEngine, "own prompts": OwnPromptsEngine, "unshared": UnsharedEngine}


class DenseOnly(TrainerCallback):
    """Refuses a measurement in which random weights wrote a box after all."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and logs.get("kept_ratio", 1.0) != 1:
            raise ValueError(f"the weights wrote a box at step {state.global_step}: prompts differ; measure again")


def run(job: Job, policy: SparseVLM, images: Sequence[Path], meter: Meter, out: Path) -> None:
    """Make the job's steps."""
    engine = ENGINES[job.way](policy.backbone)
    if isinstance(engine, UnsharedEngine):
        engine.num_reasonings = job.group
    engine.meter, policy.engine = meter, engine
    banned = policy.backbone.banned_token_ids  # read before the stop tokens go, which it leaves out
    policy.backbone.stop_token_ids, policy.backbone.banned_token_ids = (), banned
    config = DualStreamConfig(
        output_dir=str(out),
        schedule="joint",
        localization_steps=1,
        reasoning_steps=job.steps - 1,
        questions_per_step=job.questions,
        num_localizations=job.group,
        num_reasonings=job.group,
        max_localization_tokens=job.tokens,
        max_reasoning_tokens=job.tokens,
        skip_equal_outcomes=False,
        micro_batch_tokens=job.micro_batch_tokens,
        log_gradient_cosine_steps=job.steps,  # at the warm-up only
        log_samples_steps=0,
        save_steps=10**6,
        disable_tqdm=True,
    )
    records = [Record(f"{i}", (path,), question_text(i), "A") for i, path in enumerate(images)]
    extra = ExtraReward("noise", lambda response, record: noise(response.text), weight=1.0, branch="both")
    trainer = DualStreamTrainer(
        policy,
        config,
        records,
        reward_weights=RewardWeights(),
        reward_funcs=[extra],
        callbacks=[Turns(job, meter), DenseOnly()],
    )
    trainer.accelerator.backward = meter.timed("backward", trainer.accelerator.backward)
    trainer.train()
