"""Checkpoints that are complete or absent, and a trainer that writes and loads them in any number of processes.

A folder is written under another name, flushed to disk, marked complete, and renamed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from vitos.engines.weights import plain_names
from vitos.policy.vlm import SparseVLM
from vitos.rl.adapters import is_adapted, load_sharded_adapters, merged_weights, save_adapted
from vitos.rl.distributed import is_sharded, sharded_state, whole_state, whole_weights_of
from vitos.rl.evidence_head import head_set_aside, read_head

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")
# The message of the plain RuntimeError that torch.save raises when write() fails.
_TORCH_WRITE_ERROR = re.compile(r"iostream error|inline_container")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or found; the message names the folder and the remedy."""


def staging_path(target: Path) -> Path:
    """The folder in which `staged_folder` prepares `target`."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, marked complete, when the block ends, and is removed if the block fails.

    The folder is renamed only after all files have reached the disk, so a kill at any moment leaves either no `target`
    or a complete one. An existing `target` is removed just before the renaming, and for that moment there is none.
    Therefore the last complete checkpoint of a run is never written again.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written; the message names the folder.
    """
    staging = staging_path(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in _files(staging)}
        (staging / MARKER).write_text("".join(f"{size} {name}\n" for name, size in sorted(sizes.items())))
        _flush(staging)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
        _sync(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITE_ERROR.search(str(error)):
            raise
        raise CheckpointError(
            f"{target} could not be written ({error}); free space or choose another output_dir. Earlier checkpoints "
            "are untouched: go on with --resume."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def extended_folder(target: Path) -> Iterator[Path]:
    """`staged_folder` for a complete folder that gets further files: the block finds copies of all files there.

    Weights are linked, not copied, where the file system can: the block must not change them.

    Raises:
        CheckpointError: as `staged_folder`.
    """
    with staged_folder(target) as staging:
        for path in _files(target):
            copy = staging / path.relative_to(target)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                (os.link if path.suffix == ".safetensors" else shutil.copy2)(path, copy)
            except OSError:
                shutil.copy2(path, copy)
        (staging / MARKER).unlink(missing_ok=True)
        yield staging


def damage(folder: Path) -> str | None:
    """The damage of a folder that `staged_folder` should have completed; None if there is none.

    The mark lists all files with their sizes, so a file that was truncated or lost later (an interrupted copy, a
    failing disk) is found; changed bytes are not. Files that were added later, such as a model card, are ignored.
    """
    if not (folder / MARKER).is_file():
        return f"it was not written to its end (there is no {MARKER})"
    for line in (folder / MARKER).read_text().splitlines():
        size, _, name = line.partition(" ")
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != int(size):
            return f"{name} has {found} of {size} bytes"
    return None


def is_complete(folder: Path) -> bool:
    """Whether a folder was completed by `staged_folder` and has lost nothing since."""
    return damage(folder) is None


def all_checkpoints(run: Path) -> list[Path]:
    """`checkpoint-N` folders of a run, oldest first, complete or not."""
    if not run.is_dir():
        return []
    found = [(int(m[1]), path) for path in run.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete `checkpoint-N` folders of a run, oldest first."""
    return [path for path in all_checkpoints(run) if is_complete(path)]


def prune_checkpoints(run: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` complete checkpoints, and folders that were left half-written."""
    if keep is not None:
        for path in complete_checkpoints(run)[: -max(1, keep)]:
            shutil.rmtree(path)
    for path in run.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _flush(folder: Path) -> None:
    for path in _files(folder):
        _sync(path)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- in a trainer ---------------------------------------------------------------------------------------------------


class CheckpointedTrainer(Trainer):
    """A `transformers.Trainer` that saves and loads complete checkpoints.

    All processes call the methods that write or gather; only the first one makes and completes folders.

    Attributes:
        policy: the policy whose model is trained; set before `Trainer.__init__` is called.
    """

    policy: SparseVLM
    _writing_to: Path | None = None  # the staged folder of the checkpoint being written

    @property
    def run_folder(self) -> Path:
        """`args.output_dir`."""
        return Path(str(self.args.output_dir))

    def _write_policy(self, folder: Path) -> None:
        """Write the policy as an ordinary checkpoint, its shards gathered, its adapters merged.

        All processes call it together.
        """
        network = cast(torch.nn.Module, self.model)
        adapted, weights = is_adapted(network), None
        with head_set_aside(self.policy.backbone):
            if is_sharded(network) or (adapted and self.is_world_process_zero()):
                weights = merged_weights(network) if adapted else whole_weights_of(network)
            with self._staged(folder) as staging:
                if self.is_world_process_zero():
                    if adapted and weights is not None:
                        save_adapted(self.policy, weights, staging)
                    else:
                        self.policy.save_pretrained(staging, weights)

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """`staged_folder`, made and completed by the first process while all of them may write to it."""
        first = self.is_world_process_zero()
        with staged_folder(target) if first else nullcontext(staging_path(target)) as staging:
            self.accelerator.wait_for_everyone()
            yield staging
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the weights of a checkpoint through `from_pretrained`.

        Trainer's method is good for adapters. For whole models it takes the names in the file as those of the module.
        In many vision-language models they differ, and it would skip all weights with no more than a warning.
        """
        read_head(self.policy.backbone, Path(resume_from_checkpoint))
        if is_adapted(self.model) and is_sharded(cast(torch.nn.Module, self.model)):
            load_sharded_adapters(self.model, Path(resume_from_checkpoint))
            return
        if is_adapted(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        network = self.policy.backbone.model
        saved = type(network).from_pretrained(resume_from_checkpoint, dtype=network.dtype)
        if is_sharded(network):
            set_model_state_dict(network, saved.state_dict(), options=StateDictOptions(full_state_dict=True))
        else:
            with head_set_aside(self.policy.backbone):
                network.load_state_dict(saved.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's method; with FSDP, the gathered state in the same files, for any number of processes to resume."""
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
        """Trainer's method; sharded weights are gathered first, which accelerate does not do for tied ones."""
        network = cast(torch.nn.Module, self.model)
        if is_sharded(network):
            self._save(output_dir, whole_weights_of(network))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with head_set_aside(self.policy.backbone), plain_names(cast(torch.nn.Module, self.model)):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.run_folder
        self.policy.save_beside(folder)
