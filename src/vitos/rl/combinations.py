"""Combinations of options that training refuses: one list for the trainer, which raises, and for `vitos doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env

from vitos.config.options import DualStreamOptions, Problem

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments


def refusals(
    options: DualStreamOptions,
    *,
    adapters: bool = False,
    recomputed_dropout: float = 0.0,
    quantized: bool = False,
    sharded: bool = False,
    processes: int = 1,
) -> Iterator[Problem]:
    """Contradictions between options and what they meet, as (key of the recipe, what is wrong and what to do).

    A recipe's own contradictions are found when it is loaded, those with its plan by `Plan.recipe_problems`.

    Args:
        options: the `train` section.
        adapters: whether low-rank adapters are trained.
        recomputed_dropout: dropout of the adapters where FSDP computes activations again, 0 elsewhere; see
            `fsdp_recomputes`.
        quantized: whether the frozen weights are kept in 4 bits.
        sharded: whether FSDP shards the model.
        processes: number of training processes.
    """
    yield from adapter_refusals(adapters, options.unfrozen_parameters, recomputed_dropout)
    if quantized and not adapters:
        yield (
            "model.quantization",
            "weights in 4 bits cannot be trained; add model.lora, or leave out the quantization",
        )
    if quantized and sharded:
        yield "trainer.fsdp", "weights in 4 bits are not sharded; leave out fsdp (DDP), or the quantization"
    if quantized and options.sampler == "vllm":
        yield "train.sampler", "vllm takes no weights in 4 bits; sample with torch, or leave out model.quantization"
    shards = int(options.sampler_options.get("tensor_parallel_size", 1))
    if options.sampler == "vllm" and processes % shards:
        yield (
            "train.sampler_options",
            f"tensor_parallel_size {shards} does not divide the {processes} processes of the run, which share the "
            "engines; choose a divisor",
        )
    if options.questions_per_step % processes:
        yield (
            "train.questions_per_step",
            f"questions_per_step ({options.questions_per_step}) must be a multiple of the {processes} processes: each "
            "takes whole questions",
        )
    elif options.minibatches > (share := options.questions_per_step // processes):
        yield (
            "train.minibatches",
            f"minibatches ({options.minibatches}) must not exceed the {share} questions of each process: each takes "
            "part in every optimizer step",
        )


def adapter_refusals(
    adapters: bool, unfrozen_parameters: str | Sequence[str] | None, recomputed_dropout: float = 0.0
) -> Iterator[Problem]:
    """What adapters do not go with; asked by reinforcement learning and by supervised training.

    Args:
        adapters: whether low-rank adapters are trained.
        unfrozen_parameters: as in the recipe.
        recomputed_dropout: as in `refusals`.
    """
    if adapters and unfrozen_parameters is not None:
        yield (
            "train.unfrozen_parameters",
            "adapters freeze all weights; leave out unfrozen_parameters, or the adapters",
        )
    if recomputed_dropout > 0:
        # accelerate wraps layers with `preserve_rng_state=False`: the second pass drops other values than the first.
        yield (
            "model.lora.dropout",
            f"dropout {recomputed_dropout:g} gives wrong gradients with FSDP's activation_checkpointing, which does "
            "not repeat what was dropped; set model.lora.dropout to 0, or leave out activation_checkpointing",
        )


def recomputed_dropout(lora: LoraConfig | None, args: TrainingArguments) -> float:
    """Dropout of the adapters where FSDP computes activations again, 0 elsewhere."""
    if lora is None or not fsdp_recomputes(args.fsdp, args.fsdp_config):
        return 0.0
    return float(lora.lora_dropout)


def fsdp_recomputes(fsdp: Any, config: Any) -> bool:
    """Whether FSDP computes activations again in the backward pass: asked for by a Trainer's arguments, or at launch.

    Args:
        fsdp, config: `fsdp` and `fsdp_config` of the Trainer.
    """
    given = bool(fsdp) and isinstance(config, Mapping) and bool(config.get("activation_checkpointing"))
    # `accelerate launch` passes its configuration on like this.
    return given or (
        parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
    )
