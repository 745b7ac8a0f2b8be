"""The knobs of the dual-stream training, and the field types that every section of a recipe is made of.

Apart from `vitos.config.recipe`, because the trainer's configuration inherits `DualStreamOptions`. Importable without
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
    """Run a section's own rules inside pydantic, so that they are reported together with all other problems."""
    if found := list(section.problems()):
        raise PydanticCustomError(RULES, RULES, {"problems": found})
    return section


Bool = Annotated[bool, Strict()]  # 1 and "yes please" are no booleans
Int = Annotated[int, Strict()]  # true and "16" are no integers
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]  # "2e-6" is one (YAML 1.1 text)
Count = Annotated[Int, Field(ge=1)]
CountOrZero = Annotated[Int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
NameOrNames = Annotated[str | list[str], PlainValidator(_name_or_names)]
Checked = AfterValidator(_apply_rules)
FORBID_UNKNOWN = ConfigDict(extra="forbid")


@dataclass
class DualStreamOptions:
    """What the dual-stream trainer does; its `DualStreamConfig` inherits these fields, and their defaults live here.

    Not frozen, because `transformers.TrainingArguments` is not. Steps are optimizer updates.

    Attributes:
        schedule: "staged" trains localization, then reasoning (paper). The rest are ablations: "reversed" order,
            "alternating" branches by step, "joint" sum of both losses, one branch only, and "dense": RL without
            pruning, both streams see all tokens.
        localization_steps, reasoning_steps: updates given to each branch. "localization-only" and "reasoning-only"
            run their own number, all other schedules the sum (`total_steps`).

        questions_per_step: questions of one update, all processes together.
        num_localizations: G, localization rollouts of a question.
        num_reasonings: K, reasoning rollouts of each localization.
        stage1_num_localizations, stage1_num_reasonings: G and K of the updates that train localization alone, whose
            reasonings only tell what a box is worth; None: as the others.
        temperature: of sampling and scoring, > 0.
        max_localization_tokens, max_reasoning_tokens: longest response, in training and evaluation.

        advantage_group: baseline over all G x K pairs of a question (paper), or over the K pairs of one localization
            ("evidence"; λ·acc(O_i) then cancels in the reasoning branch).
        scale_advantages: divide by the group's standard deviation.
        advantage_std_floor: least divisor.
        skip_equal_outcomes: leave out groups whose answers are all right or all wrong.
        oversampling_rounds: times that an update asks further questions in the place of those left out everywhere, as
            many as are lacking (DAPO's dynamic sampling, bounded). 0: none.

        sampler: what writes the rollouts: "torch", the trained model itself, or "vllm" beside it, whose weights are
            pushed before every update.
        sampler_options: further arguments of `vllm.LLM`, such as gpu_memory_utilization and max_model_len.
        importance_cap: largest weight of a token that another engine sampled (truncated importance sampling), >= 1.

        clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high.
        kl_beta: weight of the k3 KL to the initial model; 0 holds no second model.

        localization_kl: guard of stage 2: weight of the KL to the stage-1 policy on localization prompts.
        localization_share: guard of stage 2: share of the localization loss mixed in, 0 <= share < 1.
        frozen_boxes: guard of stage 2: boxes come from the frozen stage-1 weights.

        unfrozen_parameters: regular expressions; only weights whose name holds a match of one of them are trained, of
            those that train at all (the vision encoder never does). None: all.
        learning_rate, weight_decay, adam_beta2, max_grad_norm, lr_scheduler_type, warmup_steps, seed, bf16:
            as in `transformers.TrainingArguments`.
        stage1_learning_rate: peak learning rate of the stage that trains localization alone; None: `learning_rate`.
        micro_batch_tokens: padded tokens of one forward pass when sampling and scoring; lower it to save memory.
        max_skipped_updates: updates in a row that may be left out because their loss or gradient is not finite; one
            more stops the run. 0: the first one does.

        logging_steps, save_steps, save_total_limit, report_to: as in `transformers.TrainingArguments`.
        log_gradient_cosine_steps: every so many updates log the cosine between the two branches' gradients (costs
            one more backward pass). 0: only under `schedule: joint`, there at every update.
        log_samples_steps, log_samples: every so many updates write so many questions with all their texts; 0: never.
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
    oversampling_rounds: CountOrZero = 0

    sampler: Literal["torch", "vllm"] = "torch"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    importance_cap: Annotated[Number, Field(ge=1)] = 2.0  # TIS: "Your Efficient RL Framework Secretly ..." (2025)

    clip_low: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28  # DAPO, arXiv 2503.14476 (EasyR1: 0.3)
    kl_beta: NotNegative = 0.0

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
        """Updates of the whole run."""
        if self.schedule == "localization-only":
            return self.localization_steps
        if self.schedule == "reasoning-only":
            return self.reasoning_steps
        return self.localization_steps + self.reasoning_steps

    def group_size(self, localization_alone: bool) -> tuple[int, int]:
        """G and K of an update."""
        if not localization_alone:
            return self.num_localizations, self.num_reasonings
        return (
            self.stage1_num_localizations or self.num_localizations,
            self.stage1_num_reasonings or self.num_reasonings,
        )

    def problems(self) -> Iterator[Problem]:
        """Rules between fields; the range of each field alone is in its annotation."""
        pairs = self.num_localizations * self.num_reasonings
        if self.advantage_group == "pair" and pairs < 2:
            yield (
                "num_localizations",
                "one pair is no group to compare; num_localizations x num_reasonings must be >= 2",
            )
        for name in ("stage1_num_localizations", "stage1_num_reasonings"):
            if getattr(self, name) and self.schedule not in ("staged", "reversed", "localization-only", "alternating"):
                yield name, f"no update of train.schedule: {self.schedule} trains localization alone; leave it out"
        if self.stage1_learning_rate and self.schedule not in ("staged", "reversed"):
            yield "stage1_learning_rate", f"train.schedule: {self.schedule} has one rate; leave it out"
        if self.advantage_group == "evidence" and self.num_reasonings < 2:
            yield "num_reasonings", "must be >= 2 with train.advantage_group: evidence, got 1"
        if self.sampler_options and self.sampler != "vllm":
            yield "sampler_options", "are arguments of vLLM; set train.sampler: vllm, or leave them out"
        if self.oversampling_rounds and not self.skip_equal_outcomes:
            yield "oversampling_rounds", "has no effect with train.skip_equal_outcomes: false, which leaves none out"
        for name in ("localization_kl", "localization_share", "frozen_boxes"):
            if getattr(self, name) and self.schedule != "staged":
                yield name, f"guards stage 2 of train.schedule: staged; leave it out with {self.schedule}"
        if self.kl_beta and self.localization_kl:
            yield (
                "localization_kl",
                "pulls to the stage-1 policy where train.kl_beta pulls to the initial one; set one of them to 0",
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
        """Check ranges and rules of an instance built in code (`TrainingArguments` rewrites some: call it before).

        Raises:
            ConfigError: with all problems.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(DualStreamOptions)}
        try:
            TypeAdapter(Annotated[DualStreamOptions, Checked]).validate_python(values)
        except ValidationError as error:
            raise ConfigError(type(self).__name__, explain(error.errors(), DualStreamOptions, ("train",))) from None
