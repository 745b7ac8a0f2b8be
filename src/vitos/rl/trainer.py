"""`DualStreamTrainer`: a `transformers.Trainer` whose step is the dual stream.

One update: roll out both branches, reward them, turn the rewards into advantages, and run the loss of the branch (or
branches) that the schedule names. Everything else (loop, optimiser, logging, mixed precision, resume) is Trainer's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, get_scheduler

from vitos.cache import EmbeddingCache
from vitos.data.record import Record
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine, chunk_by_tokens
from vitos.policy import SparseVLM, Stopwatch
from vitos.rl.adapters import add_adapters, is_adapted, merged_copy
from vitos.rl.branch import BranchBatch, localization_batch, reasoning_batch
from vitos.rl.callbacks import FiguresCallback, MetricsFileCallback, write_samples
from vitos.rl.checkpoint import (
    MARKER,
    CheckpointError,
    complete_checkpoints,
    is_complete,
)
from vitos.rl.checkpointed import CheckpointedTrainer
from vitos.rl.config import DualStreamConfig
from vitos.rl.guards import CollapseWarning, UpdateGuard
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.parallel import (
    gathered,
    gradient,
    gradient_norm,
    gradient_products,
    is_sharded,
    maximum,
    runnable,
    set_up_sharding,
    sum_gradients,
    sums,
    whole_weights,
)
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.rollout import RolloutBatch, RolloutPlan, roll_out, rollout_metrics
from vitos.rl.schedule import LOCALIZATION, REASONING, Stage, make_stages, stage_at
from vitos.scans import ScanStore

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
FINAL = "model"


class DualStreamTrainer(CheckpointedTrainer):
    """Trains both branches of a policy by reinforcement learning.

    Args:
        model: the policy; its vision encoder is frozen, its weights are trained in place.
        args: schedule, group sizes, optimiser.
        train_dataset: questions, with gold boxes where the IoU reward shall count.
        reward_weights: of the built-in terms.
        reward_funcs: further rewards.
        lora: train adapters on the language model instead of its weights; they are merged into the final checkpoint.
        cache: visual tokens of the questions' images; without one they are computed.

    After `train()`: `output_dir/model` is an ordinary Hugging Face checkpoint plus `vitos.json`, `stage1` the policy
    between two stages, `checkpoint-N` what `train(resume_from_checkpoint=True)` goes on from, `metrics.jsonl` the
    figures of every logged update and `samples/` rollouts with their boxes drawn.
    """

    args: DualStreamConfig

    def __init__(
        self,
        model: SparseVLM,
        args: DualStreamConfig,
        train_dataset: Sequence[Record],
        *,
        reward_weights: RewardWeights = RewardWeights(),
        reward_funcs: Sequence[ExtraReward] = (),
        lora: LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        cache: EmbeddingCache | None = None,
    ) -> None:
        if len(train_dataset) < args.questions_per_step:
            raise ValueError(
                f"{len(train_dataset)} training questions do not fill one update of {args.questions_per_step}; "
                "lower questions_per_step"
            )
        if model.spec.plan not in ("two_pass", "gather"):
            raise ValueError(
                f"reasoning is trained under plan two_pass or gather, not {model.spec.plan}; set one of them"
            )
        if model.spec.plan == "gather" and (refusal := model.backbone.cache_refusal):
            raise ValueError(refusal)
        self.policy = model
        self.stages = make_stages(args)
        self.reward_weights, self.reward_funcs = reward_weights, tuple(reward_funcs)
        for module in model.backbone.vision_modules:
            module.requires_grad_(False)
        network = model.backbone.model if lora is None else add_adapters(model, lora)
        super().__init__(
            model=network,
            args=args,
            train_dataset=train_dataset,
            data_collator=_collate,
            processing_class=model.backbone.tokenizer,
            callbacks=[MetricsFileCallback(), CollapseWarning(), *callbacks],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(FiguresCallback())
        if self.is_fsdp_enabled:
            if is_adapted(network):
                raise ValueError("adapters cannot be trained with FSDP yet; use DDP, or leave out model.lora")
            set_up_sharding(self.accelerator, model.backbone)
        self._warn_of_small_dtype(network)
        self.scans = ScanStore(model, cache=cache)
        self.update_guard = UpdateGuard(args.max_skipped_updates)
        # References are fixed policies: the initial one now, the one of stage 1 when stage 2 begins.
        self._initial = _frozen_copy(model, args.device) if args.kl_beta > 0 else None
        self._stage_one: SparseVLM | None = None
        self._pending: list[dict[str, float]] = []

    @property
    def _sharding(self) -> Any:
        """Accelerate's FSDP plugin."""
        return self.accelerator.state.fsdp_plugin

    def _warn_of_small_dtype(self, network: torch.nn.Module) -> None:
        small = {p.dtype for p in network.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        upcast = self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"
        if small and not upcast and self.args.learning_rate < 1e-4:
            logger.warning(
                "the trained weights are %s: most steps of learning_rate %g round to nothing on them. Load the model "
                "in float32 (model.dtype: float32; train.bf16 computes in bfloat16 all the same), or train adapters",
                ", ".join(str(dtype).removeprefix("torch.") for dtype in small),
                self.args.learning_rate,
            )

    # --- the step ---------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Roll out, reward, and back-propagate one update; returns its loss, detached."""
        args, step, records = self.args, self.state.global_step, inputs["records"]
        number, stage = stage_at(self.stages, step)
        if number > 0:
            self._enter_stage(number, first_step=step == stage.start)
        watch = Stopwatch()
        model.eval()
        with watch.stage("encode"):
            scans = self.scans.get(records)
        self.policy.engine.model = runnable(model)
        self.policy.engine.max_batch_tokens = args.micro_batch_tokens
        with whole_weights(model, self.is_fsdp_enabled and self._sharding.reshard_after_forward):
            batch = roll_out(
                self.policy,
                records,
                scans,
                step,
                RolloutPlan(
                    args.num_localizations,
                    args.num_reasonings,
                    Sampling(args.max_localization_tokens, args.temperature),
                    Sampling(args.max_reasoning_tokens, args.temperature),
                    seed=args.seed,
                    dense=stage.dense,
                ),
                self.reward_weights,
                self.reward_funcs,
                localizer=self._stage_one if args.frozen_boxes else None,
                watch=watch,
            )
        groups = gathered(self.accelerator, [group.without_embeddings() for group in batch.groups])
        metrics = rollout_metrics(groups)
        model.train()
        with watch.stage("update"):
            loss, norm, more = self._backward(model, batch, stage.branches(step), stage, step)
        admitted = self.update_guard.admits(step + 1, loss, norm, [group.record.id for group in groups])
        if not admitted:
            model.zero_grad()  # no gradient at all: the optimizer touches neither weights nor moments
        metrics |= more | {f"seconds/{name}": value for name, value in watch.seconds.items()}
        metrics |= {"stage": float(number + 1), "loss/policy": loss, "skipped_update": float(not admitted)}
        self._pending.append(metrics)
        if args.log_samples_steps and (step + 1) % args.log_samples_steps == 0 and self.is_world_process_zero():
            write_samples(self.run_folder, step + 1, groups[: args.log_samples])
        return torch.tensor(loss if admitted else 0.0, device=args.device)

    def _backward(
        self,
        model: torch.nn.Module,
        batch: RolloutBatch,
        weights: Mapping[str, float],
        stage: Stage,
        step: int,
    ) -> tuple[float, float, dict[str, float]]:
        """Gradients of the weighted sum of the branches' losses, summed over processes; the loss, their norm, figures.

        The norm of each branch's gradient is logged where it costs nothing, that is where one branch is trained
        alone, and beside the cosine.
        """
        args = self.args
        every = args.log_gradient_cosine_steps or (1 if stage.name == "joint" else 0)
        cosine = every > 0 and step % every == 0
        metrics: dict[str, float] = {}
        total, trained, gradients = 0.0, [], {}
        # A branch that is measured only, not trained, runs first: its gradient is taken and then cleared.
        order = sorted((LOCALIZATION, REASONING), key=lambda name: weights.get(name, 0.0) > 0)
        before = torch.zeros((), device=args.device)
        for name in order:
            weight = weights.get(name, 0.0)
            guard = args.localization_kl if name == LOCALIZATION and self._stage_one is not None else 0.0
            if weight == 0 and guard == 0 and not cosine:
                continue
            branch = (localization_batch if name == LOCALIZATION else reasoning_batch)(batch, args)
            loss, figures = self._branch_backward(model, branch, weight if weight or guard else 1.0, guard, batch)
            metrics |= {f"{key}/{name}": value for key, value in figures.items()}
            if weight > 0 or guard > 0:
                total += loss
                trained.append(name)
            if cosine:
                now = gradient(model)
                gradients[name] = now - before
                if weight == 0 and guard == 0:
                    model.zero_grad()
                else:
                    before = now
        if sum(metrics[f"prompts/{name}"] for name in trained) > 0:
            sum_gradients(self.accelerator, model)
        norm = gradient_norm(self.accelerator, model)
        if cosine:
            (aa, ab), (_, bb) = gradient_products(self.accelerator, model, list(gradients.values()))
            metrics["gradient_cosine"] = ab / max((aa * bb) ** 0.5, 1e-16)
            metrics |= {f"gradient_norm/{name}": x**0.5 for name, x in zip(gradients, (aa, bb), strict=True)}
        elif len(trained) == 1:
            metrics[f"gradient_norm/{trained[0]}"] = norm
        return total, norm, metrics

    def _branch_backward(
        self, model: torch.nn.Module, branch: BranchBatch, weight: float, guard: float, batch: RolloutBatch
    ) -> tuple[float, dict[str, float]]:
        """Add one branch's gradients, micro-batch by micro-batch; the token mean runs over all processes' branch."""
        args, engine = self.args, TorchEngine(self.policy.backbone, runnable(model))
        (tokens,) = sums(self.accelerator, [float(branch.tokens if branch.prompts else 0)])
        totals = dict.fromkeys(("loss", "tokens", "clipped", "mismatch_kl", "reference_kl"), 0.0)
        beta = max(args.kl_beta, guard)
        reference = (self._stage_one if guard > 0 else self._initial) if beta > 0 else None
        chunks = list(chunk_by_tokens(branch.sizes, args.micro_batch_tokens))
        passes = maximum(self.accelerator, len(chunks)) if is_sharded(model) else len(chunks)
        # FSDP divides gradients by the number of processes.
        factor = self.args.world_size if is_sharded(model) else 1
        for chunk in chunks:
            part = branch.part(chunk)
            scores = engine.score(part.prompts, part.token_ids, args.temperature)
            old, positive, negative = part.tensors(scores.logprobs)
            with torch.no_grad():
                known = None
                if reference is not None:
                    known = reference.engine.score(part.prompts, part.token_ids, args.temperature).logprobs
            out = policy_loss(
                LossInputs(
                    scores.logprobs, old, scores.mask, positive * weight, negative * weight, known, part.repeats
                ),
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                kl_beta=beta,
                denominator=max(1, int(tokens)),
            )
            self.accelerator.backward(out.loss * factor)
            for key in totals:
                totals[key] += float(out.loss.detach() if key == "loss" else getattr(out, key))
        self._keep_pace(engine, batch, passes - len(chunks))
        values = sums(self.accelerator, [*totals.values(), branch.skipped, len(branch.prompts)])
        loss, scored, *figures, skipped, prompts = values
        means = {key: value / max(1.0, scored) for key, value in zip(list(totals)[2:], figures, strict=True)}
        return loss, {**means, "skipped_groups": skipped, "prompts": prompts}

    def _keep_pace(self, engine: TorchEngine, batch: RolloutBatch, missing: int) -> None:
        """Run empty micro-batches until this process has as many as the others, whose passes need its shards."""
        shortest = min(range(len(batch.groups)), key=lambda p: len(batch.localize_prompts[p]))
        ids = batch.groups[shortest].localizations[0].completion.token_ids[:1]
        for _ in range(missing):
            scores = engine.score([batch.localize_prompts[shortest]], [[ids]], self.args.temperature)
            self.accelerator.backward(0.0 * scores.logprobs.sum())

    # --- stages -----------------------------------------------------------------------------------------------------

    def _enter_stage(self, number: int, first_step: bool) -> None:
        """Begin a stage on the checkpoint of the one before: a fresh optimiser, and references for the guards."""
        folder = self.run_folder / f"stage{number}"
        if first_step:
            self._write_policy(folder, lambda: merged_copy(self.policy, self.model))
            self._inner_optimizer.state.clear()
        if self._stage_one is None and (self.args.localization_kl > 0 or self.args.frozen_boxes):
            self._stage_one = SparseVLM.from_pretrained(folder, device=self.args.device, dtype=torch.float32)
            self._stage_one.engine.max_batch_tokens = self.args.micro_batch_tokens

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's learning-rate schedule, run anew in every stage."""
        optimizer = optimizer or self.optimizer
        if optimizer is None:
            raise ValueError("create the optimizer before its schedule")
        if self.lr_scheduler is None:
            shapes = [
                get_scheduler(
                    self.args.lr_scheduler_type,
                    optimizer=optimizer,
                    num_warmup_steps=min(self.args.warmup_steps, stage.steps),
                    num_training_steps=stage.steps,
                    scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
                ).lr_lambdas[0]
                for stage in self.stages
            ]

            def factor(step: int) -> float:
                number, stage = stage_at(self.stages, min(step, num_training_steps - 1))
                return float(shapes[number](step - stage.start))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    # --- files ------------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Run all stages and write `output_dir/model`.

        Args:
            resume_from_checkpoint: True goes on from the last complete checkpoint in `output_dir` (from the start,
                saying so, if there is none), a path from that one.

        Raises:
            FileExistsError: if `output_dir` holds checkpoints and it is not to be resumed.
            CheckpointError: if the given checkpoint is not complete.
        """
        run = self.run_folder
        found = complete_checkpoints(run)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(found[-1]) if found else None
            if not found:
                logger.warning("%s holds no complete checkpoint; training starts at update 1", run)
        elif found and not resume_from_checkpoint:
            raise FileExistsError(f"{run} holds {found[-1].name}; pass --resume to go on, or another output_dir")
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise CheckpointError(f"{resume_from_checkpoint} is no complete checkpoint; name one that holds {MARKER}")
        result = None
        if resume_from_checkpoint and Path(resume_from_checkpoint).name == f"checkpoint-{self.args.max_steps}":
            self._load_from_checkpoint(resume_from_checkpoint)  # all updates are done: Trainer would make one more
        else:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self._write_policy(run / FINAL, self._final_policy)
        return result

    def _final_policy(self) -> SparseVLM:
        """The trained policy, adapters merged into the weights."""
        if is_adapted(self.model):
            self.policy.backbone.model = cast(Any, self.model).merge_and_unload()
        return self.policy

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures and ours, averaged over the updates since the last log."""
        if self._pending:
            keys = dict.fromkeys(key for metrics in self._pending for key in metrics)
            for key in keys:
                values = [metrics[key] for metrics in self._pending if key in metrics]
                logs[key] = sum(values) / len(values)
            self._pending.clear()
        super().log(logs, start_time)


def _collate(records: Sequence[Record]) -> dict[str, Any]:
    return {"records": list(records)}


def _frozen_copy(policy: SparseVLM, device: torch.device) -> SparseVLM:
    backbone = copy.copy(policy.backbone)
    backbone.model = copy.deepcopy(policy.backbone.model).to(device).eval().requires_grad_(False)
    return SparseVLM(backbone, policy.spec)
