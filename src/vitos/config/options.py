"""The options of the dual-stream training, and the field types from which the sections of a recipe are built.

They have a module to themselves because the trainer's configuration inherits `DualStreamOptions`. Importable without
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from vitos.config.yaml_file import RULES, ConfigError, explain

Problem = tuple[str, str]  # (field, what is wrong and what to do)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _name_or_names(value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return list(value)
    raise ValueError("must be a name or a list of names")


def _apply_rules(section: Any) -> Any:
    """Run a section's rules inside pydantic, so that they are reported together with all other problems."""
    if found := list(section.problems()):
        raise PydanticCustomError(RULES, RULES, {"problems": found})
    return section


Bool = Annotated[bool, Strict()]  # not 1, not "yes please"
Int = Annotated[int, Strict()]  # not true, not "16"
Number = Annotated[
    float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)
]  # "2e-6" too, which YAML 1.1 reads as text
Count = Annotated[Int, Field(ge=1)]
CountOrZero = Annotated[Int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
NameOrNames = Annotated[str | list[str], PlainValidator(_name_or_names)]
Checked = AfterValidator(_apply_rules)
FORBID_UNKNOWN = ConfigDict(extra="forbid")


@dataclass
class DualStreamOptions:
    """Options of the dual-stream trainer, with their defaults. Its `DualStreamConfig` inherits the fields.

    The class is not frozen, because `transformers.TrainingArguments` is not. A step is an update: the rollouts of its
    questions, and as many optimizer steps from them as there are `minibatches`.

    Attributes:
        schedule: "staged" trains localization, then reasoning (paper). The others are ablations: "reversed" order,
            "alternating" branches by step, "joint" sum of both losses, one branch only, and "dense", RL without
            pruning, in which both streams see all tokens.
        localization_steps, reasoning_steps: number of updates for each branch. "localization-only" and
            "reasoning-only" run one of the two numbers, all other schedules their sum (`total_steps`).

        questions_per_step: number of questions per update, over all processes.
        num_localizations: G, number of localization rollouts per question.
        num_reasonings: K, number of reasoning rollouts per localization.
        stage1_num_localizations, stage1_num_reasonings: G and K in updates that train localization alone, in which
            reasoning rollouts only measure the worth of a box; None: the same as in the others.
        temperature: temperature of sampling and scoring, > 0.
        max_localization_tokens, max_reasoning_tokens: length limit of a response, in training and evaluation.

        advantage_group: the group whose mean is the baseline: all G x K pairs of a question ("pair", paper), or the K
            pairs of one localization ("evidence"; λ·acc(O_i) then cancels in the reasoning branch).
        scale_advantages: whether advantages are divided by the group's standard deviation.
        advantage_std_floor: ε, added to the standard deviation.
        loss: the form of the loss (`vitos.rl.objectives`): "token_mean" averages the clipped objective over the tokens
            of the batch, "grpo" over those of each completion first, "dr_grpo" divides by a constant, the length
            limit; "gspo" has one clipped ratio per completion; "cispo" clips the weight and not the gradient.
        minibatches: number of optimizer steps per update, each on its share of the questions; from the second one on
            the policy is no longer the one that sampled, and the ratio is clipped.
        token_mean: what the mean of the loss runs over: completions of the groups that are "kept", as if the others
            had not been asked (DAPO), or of "all" groups, so that skipping groups makes the gradient smaller.
        mask_truncated: whether completions that were cut off by their length limit are left out of the loss. Otherwise
            they count like any other, usually with the reward of an unreadable answer.
        skip_equal_outcomes: whether groups are left out whose answers are all right or all wrong.
        oversampling_rounds: number of times that an update replaces the questions that it leaves out altogether by
            new ones (DAPO's dynamic sampling, bounded). 0: never.

        sampler: the engine that writes the rollouts: "torch", which is the trained model, or "vllm", an engine that
            gets the weights before each update.
        sampler_options: further arguments of `vllm.LLM`, such as gpu_memory_utilization, max_model_len and
            tensor_parallel_size.
        sampler_sleep: GPU memory that vLLM gives back during the update: 0: none; 1: its cache and its weights, which
            wait in host memory; 2: both, without a copy in host memory.
        importance_cap: largest weight of a token that another engine sampled (truncated importance sampling), >= 1.

        clip_low, clip_high: limits of the ratio, which is clipped to 1 - clip_low .. 1 + clip_high.
        kl_beta: weight of the k3 KL to the initial model; with 0 no second model is held.
        entropy_beta: weight of the entropy of the policy's distributions, which is then maximised; 0: not computed.
        max_mismatch_kl: largest `mismatch_kl`, in nats per token, at the first update of a process; a larger one stops
            the run. None: no limit.

        localization_kl: guard of stage 2: weight of the KL to the stage-1 policy on localization prompts.
        localization_share: guard of stage 2: share of the localization loss in the sum, 0 <= share < 1.
        frozen_boxes: guard of stage 2: whether boxes come from the frozen stage-1 weights.

        unfrozen_parameters: regular expressions; only weights whose name contains a match are trained (the vision
            encoder never is). None: all.
        learning_rate, weight_decay, adam_beta2, max_grad_norm, lr_scheduler_type, warmup_steps, seed, bf16:
            the fields of `transformers.TrainingArguments`.
        stage1_learning_rate: peak learning rate of the stage that trains localization alone; None: `learning_rate`.
        micro_batch_tokens: number of padded tokens in one forward pass when sampling and scoring; a lower one saves
            memory.
        sampling_batch_tokens: number of padded tokens that the torch engine samples at once, which takes less memory
            than scoring as many; None: `micro_batch_tokens`.
        max_skipped_updates: number of consecutive updates that may be skipped because their loss or gradient is not
            finite; the next one stops the run.

        logging_steps, save_steps, save_total_limit, report_to: the fields of `transformers.TrainingArguments`.
        log_gradient_cosine_steps: number of updates between two measurements of the cosine of the branches' gradients
            (each costs one more backward pass). 0: only under `schedule: joint`, there at each update.
        log_samples_steps: number of updates between two samples in the log; 0: none.
        log_samples: number of questions in a sample, each with all its texts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    schedule: Literal["staged", "reversed", "alternating", "joint", "localization-only", "reasoning-only", "dense"] = (
        "staged"
    )
    localization_steps: CountOrZero = 100
    reasoning_steps: CountOrZero = 100

    questions_per_step: Count = 16
    num_localizations: Count = 4
    num_reasonings: Count = 4
    stage1_num_localizations: Count | None = None
    stage1_num_reasonings: Count | None = None
    temperature: Positive = 1.0
    max_localization_tokens: Count = 256
    max_reasoning_tokens: Count = 256

    advantage_group: Literal["pair", "evidence"] = "pair"
    scale_advantages: Bool = True
    advantage_std_floor: Positive = 1e-4
    skip_equal_outcomes: Bool = True
    loss: Literal["token_mean", "grpo", "dr_grpo", "gspo", "cispo"] = "token_mean"
    minibatches: Count = 1
    token_mean: Literal["kept", "all"] = "kept"
    mask_truncated: Bool = False
    oversampling_rounds: CountOrZero = 0

    sampler: Literal["torch", "vllm"] = "torch"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    sampler_sleep: Literal[0, 1, 2] = 1
    importance_cap: Annotated[Number, Field(ge=1)] = 2.0  # TIS: "Your Efficient RL Framework Secretly ..." (2025)

    clip_low: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28  # DAPO, arXiv 2503.14476 (EasyR1: 0.3)
    kl_beta: NotNegative = 0.0
    entropy_beta: NotNegative = 0.0
    max_mismatch_kl: Positive | None = 0.05  # bfloat16 engines that agree have about 0.001

    localization_kl: NotNegative = 0.0
    localization_share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    frozen_boxes: Bool = False

    unfrozen_parameters: NameOrNames | None = None
    learning_rate: Positive = 1e-6
    stage1_learning_rate: Positive | None = None
    weight_decay: NotNegative = 0.0
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95  # TrainingArguments' 0.999 is slow for 100 updates
    max_grad_norm: Positive = 1.0
    lr_scheduler_type: str = "constant"
    warmup_steps: CountOrZero = 0
    seed: CountOrZero = 0
    bf16: Bool = False
    micro_batch_tokens: Count = 16_384
    sampling_batch_tokens: Count | None = None
    max_skipped_updates: CountOrZero = 3

    logging_steps: Count = 1
    save_steps: Count = 50
    save_total_limit: Count | None = 2
    report_to: NameOrNames = "none"
    log_gradient_cosine_steps: CountOrZero = 0
    log_samples_steps: CountOrZero = 25
    log_samples: CountOrZero = 4

    @property
    def total_steps(self) -> int:
        """Number of updates in the run."""
        if self.schedule == "localization-only":
            return self.localization_steps
        if self.schedule == "reasoning-only":
            return self.reasoning_steps
        return self.localization_steps + self.reasoning_steps

    def group_size(self, localization_alone: bool) -> tuple[int, int]:
        """G and K of an update, which trains localization alone or not."""
        if not localization_alone:
            return self.num_localizations, self.num_reasonings
        return (
            self.stage1_num_localizations or self.num_localizations,
            self.stage1_num_reasonings or self.num_reasonings,
        )

    def problems(self) -> Iterator[Problem]:
        """Broken rules between fields. The range of a single field is in its annotation."""
        pairs = self.num_localizations * self.num_reasonings
        if self.advantage_group == "pair" and pairs < 2:
            yield (
                "num_localizations",
                "one pair has nothing to be compared with; num_localizations x num_reasonings must be >= 2",
            )
        for name in ("stage1_num_localizations", "stage1_num_reasonings"):
            if getattr(self, name) and self.schedule not in ("staged", "reversed", "localization-only", "alternating"):
                yield name, f"train.schedule: {self.schedule} never trains localization alone; leave it out"
        if self.stage1_learning_rate and self.schedule not in ("staged", "reversed"):
            yield "stage1_learning_rate", f"train.schedule: {self.schedule} has one learning rate; leave it out"
        if self.advantage_group == "evidence" and self.num_reasonings < 2:
            yield "num_reasonings", "must be >= 2 with train.advantage_group: evidence, got 1"
        if self.sampler_options and self.sampler != "vllm":
            yield "sampler_options", "are passed to vLLM only; set train.sampler: vllm, or leave them out"
        if self.oversampling_rounds and not self.skip_equal_outcomes:
            yield "oversampling_rounds", "has no effect with train.skip_equal_outcomes: false, which skips no question"
        for name in ("localization_kl", "localization_share", "frozen_boxes"):
            if getattr(self, name) and self.schedule != "staged":
                yield name, f"guards stage 2 of train.schedule: staged; leave it out with {self.schedule}"
        if self.minibatches > self.questions_per_step:
            yield "minibatches", f"must not exceed train.questions_per_step ({self.questions_per_step})"
        if self.kl_beta and self.localization_kl:
            yield (
                "localization_kl",
                "pulls towards the stage-1 policy, but train.kl_beta towards the initial one; set one of them to 0",
            )
        unused = {"localization-only": "reasoning_steps", "reasoning-only": "localization_steps"}.get(self.schedule)
        for name, branch in (("localization_steps", "reasoning-only"), ("reasoning_steps", "localization-only")):
            if name != unused and getattr(self, name) == 0:
                yield name, f"must be >= 1 with train.schedule: {self.schedule} (or use schedule: {branch})"
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            yield "warmup_steps", "has no effect with lr_scheduler_type: constant; use constant_with_warmup"
        elif self.warmup_steps > self.total_steps:
            yield "warmup_steps", f"must not exceed the {self.total_steps} steps of the run, got {self.warmup_steps}"

    def validate(self) -> None:
        """Check the ranges and rules of an instance that was built in code.

        Call it before `TrainingArguments.__post_init__`, which changes some fields.

        Raises:
            ConfigError: if something is wrong; lists all problems.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(DualStreamOptions)}
        try:
            TypeAdapter(Annotated[DualStreamOptions, Checked]).validate_python(values)
        except ValidationError as error:
            raise ConfigError(type(self).__name__, explain(error.errors(), DualStreamOptions, ("train",))) from None
