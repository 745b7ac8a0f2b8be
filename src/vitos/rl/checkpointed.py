"""A `transformers.Trainer` whose checkpoints are whole or absent and load under any number of processes.

Every process calls what writes or gathers; the first one alone makes and finishes folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import is_adapted
from vitos.rl.checkpoint import prune_checkpoints, staged_folder, staging_path
from vitos.rl.distributed import is_sharded, sharded_state, whole_state, whole_weights_of


class CheckpointedTrainer(Trainer):
    """Saves and loads; what is learned is a subclass's.

    Attributes:
        policy: whose model is trained; set before Trainer's own `__init__`.
    """

    policy: SparseVLM
    _writing_to: Path | None = None  # the staged folder of the checkpoint being written

    @property
    def run_folder(self) -> Path:
        """`args.output_dir`."""
        return Path(str(self.args.output_dir))

    def _write_policy(self, folder: Path, policy: Callable[[], SparseVLM]) -> None:
        """Write a policy as an ordinary checkpoint, its shards gathered; all processes call it together."""
        network = cast(torch.nn.Module, self.model)
        weights = whole_weights_of(network) if is_sharded(network) else None
        with self._staged(folder) as staging:
            if self.is_world_process_zero():
                policy().save_pretrained(staging, weights)

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """`staged_folder`, made and finished by the first process while all of them may write to it."""
        first = self.is_world_process_zero()
        with staged_folder(target) if first else nullcontext(staging_path(target)) as staging:
            self.accelerator.wait_for_everyone()
            yield staging
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

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
        if is_sharded(network):
            set_model_state_dict(network, saved.state_dict(), options=StateDictOptions(full_state_dict=True))
        else:
            network.load_state_dict(saved.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's; with FSDP the whole state in the same files, so that any number of processes can go on."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self._inner_optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self._schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        inner, folder = self._inner_optimizer, Path(checkpoint)
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        inner.load_state_dict(sharded_state(state, [p for group in inner.param_groups for p in group["params"]]))
        self._schedule.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    @property
    def _schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        return cast(torch.optim.lr_scheduler.LRScheduler, self.lr_scheduler)

    @property
    def _inner_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = self.run_folder
        target = run / f"checkpoint-{self.state.global_step}"
        with self._staged(target) as staging:
            self._writing_to = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                # Trainer writes <folder>/checkpoint-N; its files move up into the staged folder.
                for path in (staging / target.name).iterdir():
                    path.rename(staging / path.name)
                (staging / target.name).rmdir()
        if self.is_world_process_zero():
            prune_checkpoints(run, self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to) if self._writing_to is not None else str(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; sharded weights are gathered first, which accelerate leaves undone for tied ones."""
        network = cast(torch.nn.Module, self.model)
        if is_sharded(network):
            self._save(output_dir, whole_weights_of(network))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.run_folder
        self.policy.backbone.image_processor.save_pretrained(folder)
        self.policy.spec.save(folder, self.policy.backbone)
