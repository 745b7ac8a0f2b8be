"""The recipe: every value of a run, typed and validated, importable without torch, transformers or NumPy.

A recipe is a YAML file whose keys are the fields of `Recipe`. `load_recipe` reads it, applies `--set` overrides and
reports all problems at once, each with its dotted key; `dump_recipe` writes it back with every default filled in.
Paths are kept as written: relative ones are relative to the current directory, not to the recipe.

A dataclass that is built in code is not checked. The ranges in the annotations and the rules in `problems` are applied
by `load_recipe` and by `DualStreamOptions.validate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from vitos.config.judge import JudgeSection
from vitos.config.options import (
    FORBID_UNKNOWN,
    Bool,
    Checked,
    Count,
    CountOrZero,
    DualStreamOptions,
    NameOrNames,
    NotNegative,
    Number,
    Positive,
    Problem,
)
from vitos.config.shipped import find_recipe
from vitos.config.warm_start import WarmStartSection
from vitos.config.yaml_file import RULES, ConfigError, dump_yaml, explain, override, parse_yaml
from vitos.core.registry import PLANS

__all__ = [
    "ConfigError",
    "DataSection",
    "DualStreamOptions",
    "EvaluateSection",
    "ExtraRewardSection",
    "HeadSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "RewardsSection",
    "SparsifySection",
    "WarmStartSection",
    "dump_recipe",
    "load_recipe",
]


def _paths(value: object) -> tuple[str, ...]:
    """One path, a list of paths or null, as a tuple."""
    values = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise ValueError("must be a path or a list of paths")
    return tuple(values)


def _file_and_name(value: str) -> str:
    path, _, name = value.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError('must look like "rewards.py:my_reward"')
    return value


Paths = Annotated[tuple[str, ...], PlainValidator(_paths)]


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters on the language model instead of full training; needs the `lora` extra (PEFT).

    Attributes:
        r: rank, >= 1.
        alpha: scale; the adapter's output is multiplied by alpha / r.
        dropout: dropout rate on the adapter's input, 0 <= dropout < 1.
        target_modules: names of linear layers, or "all-linear"; the vision encoder is never adapted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: NameOrNames = "all-linear"


@dataclass(frozen=True)
class ModelSection:
    """The checkpoint that is trained, and how it is loaded.

    Attributes:
        path: "nano" (the model inside the package), a folder or a hub id.
        dtype: number format of the weights; "auto" is the checkpoint's.
        attn_implementation: name of an attention function of transformers; "sdpa" needs no other package.
        trust_remote_code: whether Python code that comes with the checkpoint may run.

        coordinates: form of boxes in text: fractions with two decimals, pixels of the resized image, or 0..1000.
            None: the checkpoint's.
        min_pixels, max_pixels: limits of the resized image's area, in pixels. None: the checkpoint's.

        lora: adapters to train instead of the weights. None: train the weights.
        quantization: number format of the language model's frozen linear layers under adapters: 4 bits ("nf4", needs
            the `quant` extra). None: `dtype`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    path: str = "nano"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: Bool = False
    coordinates: Literal["normalized", "absolute", "per_mille"] | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    lora: LoraSection | None = None
    quantization: Literal["nf4"] | None = None

    def problems(self) -> Iterator[Problem]:
        if not self.path:
            yield "path", 'is empty; give "nano", a folder or a hub id'
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            yield "min_pixels", f"must not exceed model.max_pixels ({self.max_pixels}), got {self.min_pixels}"


@dataclass(frozen=True)
class SparsifySection:
    """From boxes to the visual tokens that the reasoning stream sees (docs/method.md, sections 2 to 4).

    Attributes:
        margin: number of cells by which each box is widened, >= 0.
        min_tokens: least number of kept tokens, >= 1; of several images, in each with a box.
        other_images: number of kept tokens, >= 0, in an image without a box where another image has one; with 0 only
            its number in the prompt remains.
        fusion: the way in which tokens outside the boxes are merged into kept ones.
        beta: share of the outside tokens in a kept token under `fusion: weighted`, 0..1.
        positions: "keep" the position ids of the dense prompt; "renumber" is an ablation that destroys grounding.
        plan: what reasoning is trained and evaluated on: a prompt of the kept tokens ("two_pass", the paper), or the
            keys and values of the kept tokens, which saw the whole image ("gather"; nothing is fused), or of their
            cells alone, found on a reduced image ("coarse"; nothing is fused).
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    margin: CountOrZero = 0
    min_tokens: Count = 1
    other_images: CountOrZero = 0
    fusion: Literal["none", "mean", "weighted"] = "weighted"
    beta: Annotated[Number, Field(ge=0, le=1)] = 0.15
    positions: Literal["keep", "renumber"] = "keep"
    plan: str = "two_pass"

    def problems(self) -> Iterator[Problem]:
        if self.plan not in PLANS.names():
            yield "plan", f"must be one of {', '.join(PLANS.names())}, got {self.plan!r}"


@dataclass(frozen=True)
class DataSection:
    """Record files (JSON or JSONL), one path or a list; relative paths are relative to the current directory.

    Attributes:
        train: files or benchmarks (`benchmark:NAME[@SPLIT][=FOLDER]`) with the questions to train on.
        eval: the same with the questions of the evaluation after training, one data set each; empty: no evaluation.
        limit_train: number of training questions to use, from the first one on; None: all.
        limit_eval: number of questions to use of each evaluation file; None: all.
        cache: folder that `vitos data cache` made from these files with this model's encoder; None: encode each image
            when it is needed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    train: Paths
    eval: Paths = ()
    limit_train: Count | None = None
    limit_eval: Count | None = None
    cache: Annotated[str, Field(min_length=1)] | None = None

    @property
    def splits(self) -> tuple[list[str], list[str]]:
        """All sources, and for each of them "train" or "eval"."""
        return [*self.train, *self.eval], ["train"] * len(self.train) + ["eval"] * len(self.eval)

    def problems(self) -> Iterator[Problem]:
        if not self.train:
            yield "train", "is empty; give at least one record file"
        for name in ("train", "eval"):
            paths = getattr(self, name)
            for path in sorted({p for p in paths if paths.count(p) > 1}):
                yield name, f"lists {path} more than once; list each file once"


@dataclass(frozen=True)
class ExtraRewardSection:
    """A reward that the user wrote.

    Attributes:
        function: the function, as "file.py:name"; the file is relative to the current directory.
        weight: factor of the reward, any finite number.
        branch: the branch whose responses it judges.
        per: whether it takes one response, or all of a branch to one question.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    function: Annotated[str, AfterValidator(_file_and_name)]
    weight: Number = 1.0
    branch: Literal["localization", "reasoning", "both"] = "localization"
    per: Literal["response", "group"] = "response"

    @property
    def name(self) -> str:
        """The function's name, under which the reward is logged."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class RewardsSection:
    """Weights of the reward terms, all >= 0 (docs/method.md, section 7; the terms are the paper's, the weights ours).

    Attributes:
        format: w_f, weight of exactly the format that was asked for.
        iou: w_iou, weight of the evidence boxes' matched IoU; localization only, abstains without gold boxes.
        accuracy: w_a, weight of a right answer.
        feedback: λ, weight of a right answer of the partner in the other branch.
        extra: rewards that the user wrote.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    format: NotNegative = 0.2
    iou: NotNegative = 1.0
    accuracy: NotNegative = 1.0
    feedback: NotNegative = 0.5
    extra: tuple[ExtraRewardSection, ...] = ()

    def problems(self) -> Iterator[Problem]:
        if not any((self.format, self.iou, self.accuracy, self.feedback, *(e.weight for e in self.extra))):
            yield "accuracy", "all weights are 0, so nothing would be learned; set at least one of them"
        names = ["format", "iou", "accuracy", *(e.name for e in self.extra)]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "extra", f"two rewards would be logged as {name}; rename the function of one"


@dataclass(frozen=True)
class EvaluateSection:
    """The evaluation after training. The length limits of responses are those of training.

    Attributes:
        budgets: shares of visual tokens, 0 < budget <= 1, at which evidence and controls are compared.
        controls: whether questions are also answered from random, centre, inverted, shifted and oracle tokens in the
            same number.
        batch_size: number of questions that are decoded together.
        bootstrap_samples: number of resamples of the paired intervals.
        metrics: names of measures of text for answers in words (docs/metrics.md), such as bleu and rouge.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    budgets: tuple[Annotated[Number, Field(gt=0, le=1)], ...] = ()
    controls: Bool = True
    batch_size: Count = 64
    bootstrap_samples: Count = 10_000
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadSection:
    """An evidence head that learns from the trained policy's own boxes, as by `vitos distill`; it is evaluated too.

    Attributes:
        plan: plan that it is for, "one_pass" or "glance".
        layers: number of layers of the language model before it; None: a quarter.
        keep: share of the visual tokens that it keeps, in (0, 1].
        questions: number of training questions that it learns from, from the first one on.
        steps: largest number of updates.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    plan: str = "one_pass"
    layers: Count | None = None
    keep: Annotated[Number, Field(gt=0, le=1)] = 0.25
    questions: Count = 1000
    steps: Count = 2000

    def problems(self) -> Iterator[Problem]:
        if self.plan not in PLANS.names():
            yield "plan", f"must be one of {', '.join(PLANS.names())}, got {self.plan!r}"


# Fields of TrainingArguments that follow from other keys of the recipe, with the key to set instead.
_OWNED = {
    "output_dir": "output_dir",
    "max_steps": "train.localization_steps and train.reasoning_steps",
    "num_train_epochs": "train.localization_steps and train.reasoning_steps",
    "per_device_train_batch_size": "train.questions_per_step",
    "gradient_accumulation_steps": "train.questions_per_step and train.micro_batch_tokens",
} | {f.name: f"train.{f.name}" for f in dataclasses.fields(DualStreamOptions)}


def _not_owned(trainer: Mapping[str, Any]) -> Mapping[str, Any]:
    if found := [(key, f"is not set here; set {_OWNED[key]}") for key in trainer if key in _OWNED]:
        raise PydanticCustomError(RULES, RULES, {"problems": found})
    return trainer


@dataclass(frozen=True)
class Recipe:
    """One run from the data to the report.

    Attributes:
        name: name of the run in tables and reports.
        output_dir: run folder, relative to the current directory.
        data: record files.
        seed: seed of the evaluation, and of `train` and `warm_start` unless they set one.
        model: the checkpoint and how it is loaded.
        sparsify: keep rule, fusion and plan.
        warm_start: supervised start; None: no such start.
        rewards: weights of the reward terms.
        judge: a model that grades answers in words, in training and evaluation; None: the rule alone.
        train: options of the reinforcement learning.
        trainer: other fields of `transformers.TrainingArguments` (fsdp_config, deepspeed, ...), checked when the
            trainer is built.
        evidence_head: a head that finds the evidence inside the first pass, trained behind `train`; None: no head.
        evaluate: options of the evaluation after training.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN

    name: Annotated[str, Field(min_length=1)]
    output_dir: Annotated[str, Field(min_length=1)]
    data: Annotated[DataSection, Checked]
    seed: CountOrZero = 0
    model: Annotated[ModelSection, Checked] = ModelSection()
    sparsify: Annotated[SparsifySection, Checked] = SparsifySection()
    warm_start: WarmStartSection | None = None
    rewards: Annotated[RewardsSection, Checked] = RewardsSection()
    judge: Annotated[JudgeSection, Checked] | None = None
    train: Annotated[DualStreamOptions, Checked] = field(default_factory=DualStreamOptions)
    trainer: Annotated[Mapping[str, Any], AfterValidator(_not_owned)] = field(default_factory=dict)
    evidence_head: Annotated[HeadSection, Checked] | None = None
    evaluate: EvaluateSection = EvaluateSection()

    def problems(self) -> Iterator[Problem]:
        if self.model.lora is not None and self.warm_start is not None and self.warm_start.train_encoder:
            yield "warm_start.train_encoder", "does not go with model.lora, which adapts the language model alone"
        if self.model.lora is not None and self.train.unfrozen_parameters is not None:
            yield (
                "train.unfrozen_parameters",
                "has no effect with model.lora, which freezes all weights; leave one out",
            )
        if self.data.cache is not None and self.warm_start is not None and self.warm_start.train_encoder:
            yield (
                "data.cache",
                "holds the output of the encoder before the warm start trains it; leave out warm_start.train_encoder",
            )


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Checked])


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, set `overrides` in it ("train.learning_rate=2e-6", the value is YAML) and validate the result.

        >>> load_recipe("quickstart", ["train.num_reasonings=8"]).train.num_reasonings
        8

    Args:
        path: YAML file, or the name of a recipe that comes with vitos, such as "quickstart".

    Raises:
        ConfigError: if the file cannot be read or is not a mapping, or if the recipe has problems; lists all of them.
    """
    source = str(path)
    try:
        values = parse_yaml(find_recipe(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(source, [f"cannot be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"is not valid YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(source, ["does not hold a mapping; a recipe has lines such as `name: my-run`"])
    problems = [line for text in overrides for line in override(values, text)]
    if "seed" in values:
        values.setdefault("train", {})
        for section in (values["train"], values.get("warm_start")):
            if isinstance(section, dict):
                section.setdefault("seed", values["seed"])
    try:
        recipe = _RECIPE.validate_python(values)
    except ValidationError as error:
        raise ConfigError(source, problems + explain(error.errors(), Recipe)) from None
    if problems:
        raise ConfigError(source, problems)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in. `load_recipe` of it gives an equal recipe."""
    return dump_yaml(dataclasses.asdict(recipe))
