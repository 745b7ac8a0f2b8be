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
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler

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
    prune_checkpoints,
    staged_folder,
)
from vitos.rl.config import DualStreamConfig
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.rollout import RolloutBatch, RolloutPlan, roll_out, rollout_metrics
from vitos.rl.schedule import LOCALIZATION, REASONING, Stage, make_stages, stage_at
from vitos.scans import ScanStore

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
FINAL = "model"


class DualStreamTrainer(Trainer):
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
    _writing_to: Path | None = None  # the staged folder of the checkpoint being written

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
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "this version trains in one process on one device; make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
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
            callbacks=[MetricsFileCallback(), *callbacks],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(FiguresCallback())
        self.scans = ScanStore(model, cache=cache)
        # References are fixed policies: the initial one now, the one of stage 1 when stage 2 begins.
        self._initial = _frozen_copy(model) if args.kl_beta > 0 else None
        self._stage_one: SparseVLM | None = None
        self._pending: list[dict[str, float]] = []

    @property
    def run_folder(self) -> Path:
        """`args.output_dir`."""
        return Path(str(self.args.output_dir))

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
        self.policy.engine.max_batch_tokens = args.micro_batch_tokens
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
        metrics = rollout_metrics(batch)
        model.train()
        with watch.stage("update"):
            loss, more = self._backward(model, batch, stage.branches(step), stage, step)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of update {step + 1} is {loss.item()} (questions {[r.id for r in records]}); "
                "lower learning_rate, or train in float32"
            )
        metrics |= more | {f"seconds/{name}": value for name, value in watch.seconds.items()}
        metrics |= {"stage": float(number + 1), "loss/policy": loss.item()}
        self._pending.append(metrics)
        if args.log_samples_steps and (step + 1) % args.log_samples_steps == 0:
            write_samples(self.run_folder, step + 1, batch.groups[: args.log_samples])
        return loss

    def _backward(
        self,
        model: torch.nn.Module,
        batch: RolloutBatch,
        weights: Mapping[str, float],
        stage: Stage,
        step: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Gradients of the weighted sum of the branches' losses; their cosine where it is asked for."""
        args = self.args
        every = args.log_gradient_cosine_steps or (1 if stage.name == "joint" else 0)
        cosine = every > 0 and step % every == 0
        metrics: dict[str, float] = {}
        losses, gradients = [], {}
        # A branch that is measured only, not trained, runs first: its gradient is taken and then cleared.
        order = sorted((LOCALIZATION, REASONING), key=lambda name: weights.get(name, 0.0) > 0)
        before = torch.zeros(())
        for name in order:
            weight = weights.get(name, 0.0)
            guard = args.localization_kl if name == LOCALIZATION and self._stage_one is not None else 0.0
            if weight == 0 and guard == 0 and not cosine:
                continue
            branch = (localization_batch if name == LOCALIZATION else reasoning_batch)(batch, args)
            loss, figures = self._branch_backward(model, branch, weight if weight or guard else 1.0, guard)
            metrics |= {f"{key}/{name}": value for key, value in figures.items()}
            if weight > 0 or guard > 0:
                losses.append(loss)
            if cosine:
                total = self._gradient(model)
                gradients[name] = total - before
                if weight == 0 and guard == 0:
                    model.zero_grad()
                else:
                    before = total
        if cosine and len(gradients) == 2:
            a, b = gradients.values()
            metrics["gradient_cosine"] = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
            metrics |= {f"gradient_norm/{name}": float(g.norm()) for name, g in gradients.items()}
        return torch.stack(losses).sum(), metrics

    def _branch_backward(
        self, model: torch.nn.Module, branch: BranchBatch, weight: float, guard: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Add one branch's gradients, micro-batch by micro-batch; the token mean runs over the whole branch."""
        args, engine = self.args, TorchEngine(self.policy.backbone, model)
        total = torch.zeros((), device=self.args.device)
        sums = {"clipped": 0.0, "mismatch_kl": 0.0, "reference_kl": 0.0}
        tokens = 0
        beta = max(args.kl_beta, guard)
        reference = (self._stage_one if guard > 0 else self._initial) if beta > 0 else None
        for chunk in chunk_by_tokens(branch.sizes, args.micro_batch_tokens):
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
                denominator=branch.tokens,
            )
            self.accelerator.backward(out.loss)
            total += out.loss.detach()
            tokens += out.tokens
            for key in sums:
                sums[key] += getattr(out, key)
        figures = {key: value / max(1, tokens) for key, value in sums.items()}
        return total, {**figures, "skipped_groups": float(branch.skipped)}

    @staticmethod
    def _gradient(model: torch.nn.Module) -> Tensor:
        """All gradients as one float32 vector."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])

    # --- stages -----------------------------------------------------------------------------------------------------

    def _enter_stage(self, number: int, first_step: bool) -> None:
        """Begin a stage on the checkpoint of the one before: a fresh optimiser, and references for the guards."""
        folder = self.run_folder / f"stage{number}"
        if first_step:
            with staged_folder(folder) as staging:
                merged_copy(self.policy, self.model).save_pretrained(staging)
            inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            inner.state.clear()
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
        if self.is_world_process_zero():
            with staged_folder(run / FINAL) as staging:
                self._final_policy().save_pretrained(staging)
        return result

    def _final_policy(self) -> SparseVLM:
        """The trained policy, adapters merged into the weights."""
        if is_adapted(self.model):
            self.policy.backbone.model = cast(Any, self.model).merge_and_unload()
        return self.policy

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights of a checkpoint, through `from_pretrained`.

        Trainer's own loads adapters well, but takes the names of whole models as they stand in the file, which for
        many vision-language models are not the module's: it would skip all of them and only warn.
        """
        if is_adapted(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        network = self.policy.backbone.model
        saved = type(network).from_pretrained(resume_from_checkpoint, dtype=network.dtype)
        network.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = self.run_folder
        target = run / f"checkpoint-{self.state.global_step}"
        with staged_folder(target) as staging:
            self._writing_to = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            # Trainer writes <folder>/checkpoint-N; its files move up into the staged folder.
            for path in (staging / target.name).iterdir():
                path.rename(staging / path.name)
            (staging / target.name).rmdir()
        prune_checkpoints(run, self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to) if self._writing_to is not None else str(super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir) if output_dir else self.run_folder
        self.policy.backbone.image_processor.save_pretrained(folder)
        self.policy.spec.save(folder, self.policy.backbone)

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


def _frozen_copy(policy: SparseVLM) -> SparseVLM:
    backbone = copy.copy(policy.backbone)
    backbone.model = copy.deepcopy(policy.backbone.model).eval().requires_grad_(False)
    return SparseVLM(backbone, policy.spec)
