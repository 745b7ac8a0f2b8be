"""`DualStreamTrainer`: a `transformers.Trainer` whose step is the dual stream.

The update itself is in `update.py`. Here are stages, references, learning rates and files; the loop, the optimiser,
logging, mixed precision and resume are Trainer's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, get_scheduler, set_seed

from vitos.backbones.quantized import is_quantized
from vitos.core.record import Record
from vitos.engines.judge.judge import Judge
from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import add_adapters, is_adapted, load_adapters
from vitos.rl.callbacks import FiguresCallback, MetricsFileCallback, write_samples
from vitos.rl.checkpoint import CheckpointedTrainer, CheckpointError, all_checkpoints, complete_checkpoints, damage
from vitos.rl.combinations import recomputed_dropout, refusals
from vitos.rl.config import DualStreamConfig
from vitos.rl.distributed import set_up_sharding
from vitos.rl.evidence_head import join_head, leave_head
from vitos.rl.freezing import freeze_others
from vitos.rl.guards import CollapseWarning, UpdateGuard, warn_of_small_dtype
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.rollout import QuestionGroup
from vitos.rl.sampler import vllm_engine
from vitos.rl.schedule import LOCALIZATION, make_stages, stage_at
from vitos.rl.trackers import track_samples
from vitos.rl.update import DualStreamUpdate
from vitos.scans.cache import EmbeddingCache
from vitos.scans.store import ScanStore

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
FINAL = "model"


class DualStreamTrainer(CheckpointedTrainer):
    """Trains both branches of a policy by reinforcement learning.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from vitos import DualStreamConfig, SparseVLM, read_records
    >>> from vitos.data.phantom import write_phantoms
    >>> with TemporaryDirectory() as folder:
    ...     records = read_records(write_phantoms(Path(folder), "train", 2))
    ...     config = DualStreamConfig(
    ...         output_dir=f"{folder}/run", schedule="joint", localization_steps=1, reasoning_steps=1,
    ...         questions_per_step=2, num_localizations=2, num_reasonings=2, use_cpu=True, disable_tqdm=True,
    ...         max_localization_tokens=24, max_reasoning_tokens=12,
    ...     )
    ...     trainer = DualStreamTrainer(SparseVLM.from_pretrained("nano", device="cpu"), config, records)
    ...     done = trainer.train()
    ...     trained = SparseVLM.from_pretrained(f"{folder}/run/model", device="cpu")
    >>> done.global_step  # two updates, each of both branches
    2

    After `train()`, `output_dir/model` is an ordinary Hugging Face checkpoint plus `vitos.json`, `stage1` the policy
    between two stages, `checkpoint-N` the state from which `train(resume_from_checkpoint=True)` goes on,
    `metrics.jsonl` the figures of each logged update, and `samples/` texts of rollouts, with `draw` also pictures.

    Args:
        model: the policy; its vision encoder is frozen, its other weights are trained in place.
        args: schedule, group sizes, optimiser.
        train_dataset: the questions, with gold boxes if the IoU reward is to count.
        reward_weights: weights of the built-in terms.
        reward_funcs: further rewards.
        lora: adapters to train on the language model instead of its weights; merged into the final checkpoint.
        adapters: a folder with adapters of that kind to go on with; None for fresh ones.
        callbacks: further callbacks of `transformers.Trainer`.
        cache: visual tokens of the questions' images; None to compute them.
        draw: a function that draws the pictures of `samples/`, such as `vitos.reports.samples.draw_sample`; None for
            texts alone.
        judge: grades answers in words in place of the rule (`rl/graded.py`); None: the rule scores all.

    Raises:
        ValueError: if the plan cannot be trained under, or the options, the data and the model contradict each other.
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
        adapters: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        cache: EmbeddingCache | None = None,
        draw: Callable[[QuestionGroup], Image.Image] | None = None,
        judge: Judge | None = None,
    ) -> None:
        if problem := too_few_questions(len(train_dataset), args.questions_per_step):
            raise ValueError(problem)
        if refusal := _plan_refusal(model, args):
            raise ValueError(refusal)
        self.policy = model
        self.stages = make_stages(args)
        for _, why in refusals(
            args,
            adapters=lora is not None,
            recomputed_dropout=recomputed_dropout(lora, args),
            quantized=is_quantized(model.backbone.model),
        ):
            raise ValueError(why)
        if lora is None:
            join_head(model, sharded=bool(args.fsdp))
        freeze_others(model.backbone, args.unfrozen_parameters)
        set_seed(args.seed)  # of the adapters' first weights; Trainer sets it again
        network = model.backbone.model if lora is None else add_adapters(model, lora)
        if lora is not None:  # not before: the head gets no adapters, and they freeze what is there
            join_head(model, sharded=bool(args.fsdp))
        if adapters is not None:
            load_adapters(network, adapters)
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
            set_up_sharding(self.accelerator, model.backbone)
        warn_of_small_dtype(network, self.accelerator, args.learning_rate)
        if args.sampler == "vllm":
            model.engine = vllm_engine(model.backbone, args)
        self.draw = draw
        self.update_guard = UpdateGuard(args.max_skipped_updates)
        self.update = DualStreamUpdate(
            policy=model,
            args=args,
            accelerator=self.accelerator,
            dataset=train_dataset,
            scans=ScanStore(model, cache=cache),
            reward_weights=reward_weights,
            reward_funcs=tuple(reward_funcs),
            initial=_frozen_copy(model, args.device) if args.kl_beta > 0 else None,
            judge=judge,
        )
        self._pending: list[dict[str, float]] = []

    @property
    def _sharding(self) -> Any:
        """Accelerate's FSDP plugin."""
        return self.accelerator.state.fsdp_plugin

    # --- the step ---------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One update by `DualStreamUpdate.run`; returns its loss, detached, or 0 if the update is left out."""
        step = self.state.global_step
        number, stage = stage_at(self.stages, step)
        if number > 0:
            self._enter_stage(number, first_step=step == stage.start)
        skipped = 0.0

        def descend(loss: float, norm: float, groups: Sequence[QuestionGroup]) -> None:
            nonlocal skipped
            skipped += not self._admit(model, loss, norm, groups)
            if self.args.max_grad_norm > 0:
                self._clip_grad_norm(model)  # type: ignore[no-untyped-call]
            self.optimizer.step()  # type: ignore[union-attr]
            model.zero_grad()

        done = self.update.run(model, inputs["records"], stage, step, descend)
        admitted = self._admit(model, done.loss, done.norm, done.groups)
        counts = {"stage": float(number + 1), "skipped_update": skipped + (not admitted)}
        self._pending.append(done.metrics | counts)
        every = self.args.log_samples_steps
        if every and (step + 1) % every == 0 and self.is_world_process_zero():
            write_samples(self.run_folder, step + 1, done.groups[: self.args.log_samples], self.draw)
            track_samples(self.callback_handler.callbacks, self.run_folder, step + 1)
        return torch.tensor(done.metrics["loss/policy"] if admitted else 0.0, device=self.args.device)

    def _admit(self, model: torch.nn.Module, loss: float, norm: float, groups: Sequence[QuestionGroup]) -> bool:
        """Whether the gradients in the model may change the weights; if not, they are cleared."""
        admitted = self.update_guard.admits(self.state.global_step + 1, loss, norm, [g.record.id for g in groups])
        if not admitted:
            model.zero_grad()  # no gradient at all: the optimizer touches neither weights nor moments
        return admitted

    # --- stages -----------------------------------------------------------------------------------------------------

    def _enter_stage(self, number: int, first_step: bool) -> None:
        """Begin a stage on the checkpoint of the one before: a fresh optimiser, and references for the guards."""
        folder = self.run_folder / f"stage{number}"
        if first_step:
            self._write_policy(folder)
            self._inner_optimizer.state.clear()
        if self.update.stage_one is None and (self.args.localization_kl > 0 or self.args.frozen_boxes):
            stage_one = SparseVLM.from_pretrained(folder, device=self.args.device, dtype=torch.float32)
            stage_one.engine.max_batch_tokens = self.args.sampling_batch_tokens or self.args.micro_batch_tokens
            self.update.stage_one = stage_one

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's learning-rate schedule, started again in each stage with the peak of that stage."""
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

            peak = (self.args.stage1_learning_rate or self.args.learning_rate) / self.args.learning_rate

            def factor(step: int) -> float:
                number, stage = stage_at(self.stages, min(step, num_training_steps - 1))
                return float(shapes[number](step - stage.start)) * (peak if stage.name == LOCALIZATION else 1.0)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    # --- files ------------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Run all stages and write `output_dir/model`.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the last complete one in `output_dir` (with
                a warning about damaged ones behind it); if there is none, training begins at the start.
            kwargs: further arguments of `Trainer.train`.

        Raises:
            FileExistsError: if `output_dir` holds checkpoints and the run is not to be resumed.
            CheckpointError: if the given checkpoint is not complete.
        """
        run = self.run_folder
        found = complete_checkpoints(run)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(found[-1]) if found else None
            where = f"training goes on from {found[-1].name}" if found else "training starts at update 1"
            every = all_checkpoints(run)
            for path in every[every.index(found[-1]) + 1 if found else 0 :]:
                logger.warning("%s cannot be used: %s; %s", path, damage(path), where)
            if not every:
                logger.warning("%s holds no checkpoint; %s", run, where)
        elif found and not resume_from_checkpoint:
            raise FileExistsError(f"{run} holds {found[-1].name}; pass --resume to go on, or another output_dir")
        elif resume_from_checkpoint and (problem := damage(Path(resume_from_checkpoint))):
            raise CheckpointError(
                f"{resume_from_checkpoint} is not a complete checkpoint: {problem}; name another one"
            )
        result = None
        if resume_from_checkpoint and Path(resume_from_checkpoint).name == f"checkpoint-{self.args.max_steps}":
            self._load_from_checkpoint(resume_from_checkpoint)  # all updates are done: Trainer would make one more
        else:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self._write_policy(run / FINAL)
        self._merge_in_place()
        leave_head(self.policy.backbone)
        return result

    def _merge_in_place(self) -> None:
        """Take the adapters out of the policy in memory, their changes in its weights.

        Only where the weights are float32: in bfloat16 that would round the changes away, so the adapters stay.
        """
        network = cast(Any, self.model)
        if is_adapted(network) and network.get_base_model().dtype == torch.float32:
            self.policy.backbone.model = network.merge_and_unload()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures and ours, averaged over the updates since the last log."""
        if self._pending:
            keys = dict.fromkeys(key for metrics in self._pending for key in metrics)
            for key in keys:
                values = [metrics[key] for metrics in self._pending if key in metrics]
                logs[key] = sum(values) / len(values)
            self._pending.clear()
        super().log(logs, start_time)


def too_few_questions(count: int, questions_per_step: int) -> str:
    """Why so few questions cannot be trained on; empty if they can."""
    if count >= questions_per_step:
        return ""
    return f"{count} training questions do not fill one update of {questions_per_step}; lower questions_per_step"


def _plan_refusal(model: SparseVLM, args: DualStreamConfig) -> str:
    """Reason why the policy cannot be trained under its plan; empty if it can."""
    plan = model.plan
    if not plan.trainable:
        return f"no model can be trained under plan {plan.name}; use two_pass, gather or coarse"
    if plan.needs_pictures and (args.schedule == "dense" or args.sampler == "vllm"):
        wrong = "schedule: dense" if args.schedule == "dense" else "sampler: vllm"
        return f"{wrong} does not go with plan {plan.name}, which encodes the image twice; set plan two_pass"
    if plan.no_vllm and args.sampler == "vllm":
        return f"sampler: vllm {plan.no_vllm}; use torch"
    return plan.refusal(model.backbone)


def _collate(records: Sequence[Record]) -> dict[str, Any]:
    return {"records": list(records)}


def _frozen_copy(policy: SparseVLM, device: torch.device) -> SparseVLM:
    backbone = copy.copy(policy.backbone)
    backbone.model = copy.deepcopy(policy.backbone.model).to(device).eval().requires_grad_(False)
    if policy.backbone.evidence_head is not None:
        head = copy.deepcopy(policy.backbone.evidence_head)
        backbone.evidence_head = head.to(device).requires_grad_(False)
    return SparseVLM(backbone, policy.spec)
