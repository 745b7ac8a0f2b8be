"""Supervised learning of boxes, thoughts and answers: `vitos sft`, and the warm start before reinforcement learning.

Reinforcement learning improves a skill that a model shows now and then; a model that never writes a box learns nothing
from it. Most large models come with that skill. `nano`, and a model on new data, get it here.

`SupervisedTrainer` is a `transformers.Trainer`: its loop, mixed precision, logging, DDP, FSDP2 and resume. Targets are
those of `lessons.py`, the questions about one image packed behind it; the visual tokens of a frozen encoder are
computed once, or read from an embedding cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from vitos.core.record import Record
from vitos.data.images import load_image_facts
from vitos.engines.weights import plain_names
from vitos.policy.plans.dense import Dense
from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import add_adapters, is_adapted
from vitos.rl.callbacks import FiguresCallback, MetricsFileCallback
from vitos.rl.checkpoint import CheckpointedTrainer
from vitos.rl.combinations import adapter_refusals, recomputed_dropout
from vitos.rl.distributed import (
    gradient_norm,
    is_sharded,
    maximum,
    runnable,
    set_up_sharding,
    sum_gradients,
    sums,
    whole_weights_of,
)
from vitos.rl.freezing import freeze_others
from vitos.rl.guards import UpdateGuard, warn_of_small_dtype
from vitos.rl.lessons import Lesson, pack_lessons, packed_lessons, record_lesson
from vitos.scans.cache import EmbeddingCache
from vitos.scans.store import ScanStore

if TYPE_CHECKING:
    from peft import LoraConfig

SFT_METRICS = "sft.jsonl"


@dataclass
class SupervisedConfig(TrainingArguments):
    """Options of the supervised training besides those of `transformers.TrainingArguments`.

    >>> config = SupervisedConfig(output_dir="runs/start", max_steps=100, batch_size=16, use_cpu=True)
    >>> config.per_device_train_batch_size, config.lr_scheduler_type.value
    (16, 'linear')

    The learning rate follows one cycle, whatever `lr_scheduler_type` says.

    Attributes:
        batch_size: number of records per update, over all processes.
        warmup_share: share of the updates with a rising learning rate, 0 <= share < 1.
        answer_weight: weight of the tokens between `<answer>` and `</answer>`; all others have weight 1.
        by_image: whether the records about one image follow each other, so that they share their prompt's image.
            Otherwise all records are shuffled.
        train_encoder: also train the vision encoder.
        unfrozen_parameters: as in `DualStreamOptions`.
        micro_batch_tokens: number of padded tokens in one forward pass.
        max_skipped_updates: number of consecutive updates that may be skipped because they are not finite.

    Raises:
        ValueError: for a batch that the processes cannot share.
    """

    batch_size: int = 32
    learning_rate: float = 1e-3
    adam_beta2: float = 0.95
    warmup_share: float = 0.06
    answer_weight: float = 1.0
    by_image: bool = False
    train_encoder: bool = False
    unfrozen_parameters: str | list[str] | None = None
    micro_batch_tokens: int = 16_384
    max_skipped_updates: int = 3

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        self.dataloader_pin_memory = False  # records are not tensors
        self.save_strategy = self.logging_strategy = "steps"
        self.logging_first_step = True
        if self.disable_tqdm is None:
            self.disable_tqdm = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.batch_size % self.world_size:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of the {self.world_size} processes")
        self.per_device_train_batch_size = self.batch_size // self.world_size


class Ordered(Sampler[int]):
    """Indices of records for a whole run: one shuffled pass after the other.

    Args:
        records: the records.
        count: number of indices.
        seed: seed of the shuffling.
        by_image: shuffle images instead of records, and keep the records of each image together.
    """

    def __init__(self, records: Sequence[Record], count: int, seed: int, by_image: bool = False) -> None:
        groups: dict[Any, list[int]] = {}
        for index, record in enumerate(records):
            groups.setdefault(record.image_paths if by_image else index, []).append(index)
        self._groups, self._count, self._seed = list(groups.values()), count, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(self._seed)
        order: list[int] = []
        while len(order) < self._count:
            order.extend(i for group in rng.permutation(len(self._groups)).tolist() for i in self._groups[group])
        return iter(order[: self._count])


class SupervisedTrainer(CheckpointedTrainer):
    """Trains a policy on the boxes, thoughts and answers of records.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from vitos import SparseVLM, read_records
    >>> from vitos.data.phantom import write_phantoms
    >>> with TemporaryDirectory() as folder:
    ...     records = read_records(write_phantoms(Path(folder), "train", 4))
    ...     config = SupervisedConfig(
    ...         output_dir=f"{folder}/sft", max_steps=2, batch_size=4, use_cpu=True, disable_tqdm=True,
    ...         report_to="none",
    ...     )
    ...     done = SupervisedTrainer(SparseVLM.from_pretrained("nano", device="cpu"), config, records).train()
    >>> done.global_step
    2

    `output_dir` gets `checkpoint-N`, from which `train(resume_from_checkpoint=…)` goes on, and `sft.jsonl` with the
    figures of each logged update. `write` writes the trained policy.

    Args:
        model: the policy; its weights are trained in place.
        args: number of updates, batch, optimiser.
        train_dataset: the questions, with gold boxes where evidence is to be learned.
        lora: adapters to train on the language model instead of its weights.
        cache: visual tokens of the questions' images; None to compute them.
        callbacks: further callbacks of `transformers.Trainer`.

    Raises:
        ValueError: for options that contradict each other, and as `freeze_others`.
    """

    args: SupervisedConfig

    def __init__(
        self,
        model: SparseVLM,
        args: SupervisedConfig,
        train_dataset: Sequence[Record],
        *,
        lora: LoraConfig | None = None,
        cache: EmbeddingCache | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if args.train_encoder and (lora is not None or cache is not None or args.fsdp):
            raise ValueError("train_encoder does not go with adapters, an embedding cache or FSDP; leave one out")
        dropout = recomputed_dropout(lora, args)
        for _, why in adapter_refusals(lora is not None, args.unfrozen_parameters, dropout):
            raise ValueError(why)
        self.policy = model
        freeze_others(model.backbone, args.unfrozen_parameters, encoder=args.train_encoder)
        set_seed(args.seed)
        network = model.backbone.model if lora is None else add_adapters(model, lora)
        super().__init__(
            model=network,
            args=args,
            train_dataset=train_dataset,
            data_collator=lambda records: {"records": list(records)},
            processing_class=model.backbone.tokenizer,
            callbacks=[MetricsFileCallback(SFT_METRICS, "tokens"), *callbacks],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(FiguresCallback({"loss": "loss", "grad_norm": "norm"}))
        if self.is_fsdp_enabled:
            set_up_sharding(self.accelerator, model.backbone)
        warn_of_small_dtype(network, self.accelerator, args.learning_rate)
        self.update_guard = UpdateGuard(args.max_skipped_updates)
        self.scans = None if args.train_encoder else ScanStore(model, cache=cache, plan=Dense("dense"))
        self._pending: dict[str, float] = {}

    def write(self, folder: Path, adapter: Path) -> None:
        """Write the trained policy and, if adapters were trained, them alone, to be trained on.

        All processes call it together.
        """
        network: Any = self.model
        if is_adapted(network):
            weights = whole_weights_of(network) if is_sharded(network) else None
            with self._staged(adapter) as staging:
                if self.is_world_process_zero():
                    with plain_names(network):
                        network.save_pretrained(staging, state_dict=weights, save_embedding_layers=False)
        self._write_policy(folder)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        records: Any = self.train_dataset
        return Ordered(records, self.args.max_steps * self.args.batch_size, self.args.seed, self.args.by_image)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with one group of all trained weights."""
        if self.optimizer is None:
            network: Any = self.model if model is None else model
            self.optimizer = torch.optim.AdamW(
                [p for p in network.parameters() if p.requires_grad],
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """One cycle: the rate rises during `warmup_share` of the updates and falls to nearly 0."""
        if self.lr_scheduler is None:
            share = self.args.warmup_share
            if share * num_training_steps == 1:  # PyTorch would divide 0 by 0
                share += 1e-9
            cycle: Any = OneCycleLR(
                self._inner_optimizer if optimizer is None else optimizer,
                self.args.learning_rate,
                total_steps=num_training_steps,
                pct_start=share,
                cycle_momentum=False,
            )
            self.lr_scheduler = cycle
        return self.lr_scheduler

    def lessons(self, records: Sequence[Record]) -> list[Lesson]:
        """The lessons of records, those about the same images packed together."""
        backbone, spec = self.policy.backbone, self.policy.spec
        if self.scans is not None:
            scans = self.scans.get(records)
            made = [record_lesson(r, s.visuals, backbone, spec) for r, s in zip(records, scans, strict=True)]
        else:
            opened = [[load_image_facts(path) for path in record.image_paths] for record in records]
            made = [
                record_lesson(r, [i for i, _ in images], backbone, spec, [facts.shown for _, facts in images])
                for r, images in zip(records, opened, strict=True)
            ]
        return packed_lessons(records, made)

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One update's gradients, micro-batch by micro-batch; its loss, or 0 if the update is left out."""
        args, records, engine = self.args, inputs["records"], self.policy.engine
        model.train()
        with engine.using(runnable(model), args.micro_batch_tokens):
            packed = pack_lessons(self.policy.backbone, self.lessons(records), args.answer_weight)
            weight, tokens = sums(self.accelerator, [packed.weight, float(packed.learned)])
            # The encoder's gradients flow through all lessons' pictures at once.
            chunks = (
                [list(range(len(packed.prompts)))]
                if args.train_encoder
                else list(engine.score_batches(packed.prompts, packed.token_ids))
            )
            passes = int(maximum(self.accelerator, len(chunks))) if is_sharded(model) else len(chunks)
            factor = args.world_size if is_sharded(model) else 1  # FSDP divides gradients by it
            own = 0.0
            for chunk in chunks:
                loss = packed.loss(engine, chunk, weight)
                self.accelerator.backward(loss * factor)
                own += float(loss.detach())
            for _ in range(passes - len(chunks)):  # the others' passes need this process's shards
                self.accelerator.backward(0.0 * packed.loss(engine, chunks[0], weight))
        sum_gradients(self.accelerator, model)
        (total,) = sums(self.accelerator, [own])
        norm = gradient_norm(self.accelerator, model)
        admitted = self.update_guard.admits(self.state.global_step + 1, total, norm, [r.id for r in records])
        if not admitted:
            model.zero_grad()
        for name, value in (("tokens", tokens), ("skipped_updates", float(not admitted))):
            self._pending[name] = self._pending.get(name, 0.0) + value
        return torch.tensor(total if admitted else 0.0, device=args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures, and the number of tokens learned since the last log."""
        logs |= self._pending
        self._pending = {}
        super().log(logs, start_time)
