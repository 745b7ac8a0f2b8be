"""Checkpoints are whole or absent, whatever interrupts their writing."""

import errno
import os
import re
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitos.rl.checkpoint import (
    CheckpointError,
    all_checkpoints,
    complete_checkpoints,
    damage,
    is_complete,
    prune_checkpoints,
    staged_folder,
)


def write(run, step, text="weights"):
    with staged_folder(run / f"checkpoint-{step}") as staging:
        (staging / "file").write_text(text)
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(text)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_target_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "runs" / "checkpoint-3"
    with staged_folder(target) as staging:
        (staging / "file").write_text("1")
        assert not target.exists()
        assert staging.parent == target.parent  # a rename is atomic within one file system only
    assert is_complete(target)
    assert (target / "file").read_text() == "1"
    assert names(target.parent) == ["checkpoint-3"]


def test_target_is_replaced(tmp_path):
    write(tmp_path, 1, "old")
    with staged_folder(tmp_path / "checkpoint-1") as staging:
        (staging / "new").write_text("new")
    assert names(tmp_path / "checkpoint-1") == ["COMPLETE", "new"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("bad")])
def test_failure_in_the_block_passes_through_and_leaves_nothing(tmp_path, failure):
    write(tmp_path, 1)

    def fail():
        with staged_folder(tmp_path / "checkpoint-2") as staging:
            (staging / "file").write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_full_disk_at_the_end_is_named_and_leaves_nothing(tmp_path, monkeypatch, call):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*No space left.*--resume"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    assert is_complete(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("writer", ["text", "safetensors", "torch"])
def test_what_libraries_raise_on_a_full_disk_is_a_checkpoint_error_too(tmp_path, writer):
    """A real failing write: files may not grow beyond 64 KiB (as with a full disk, write() fails half-way)."""
    write(tmp_path, 1)
    weights = torch.zeros(1 << 18)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        with staged_folder(tmp_path / "checkpoint-2") as staging:
            if writer == "text":
                (staging / "file").write_text("x" * (1 << 20))
            elif writer == "safetensors":
                save_file({"w": weights}, staging / "model.safetensors")
            else:
                torch.save({"w": weights}, staging / "optimizer.pt")

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be written"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-1"]


def test_other_runtime_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), staged_folder(tmp_path / "checkpoint-1"):
        raise RuntimeError("shapes do not match")


def test_leftovers_of_a_kill_are_replaced(tmp_path):
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / ".checkpoint-2.partial" / "stale").write_text("")
    write(tmp_path, 2)
    assert names(tmp_path / "checkpoint-2") == ["COMPLETE", "file", "sub"]


def test_only_marked_folders_are_found_in_the_order_of_their_steps(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-300").mkdir()  # half-written by another program
    (tmp_path / "checkpoint-300" / "model.safetensors").write_text("half")
    with staged_folder(tmp_path / "stage1"):
        pass
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert complete_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 10]), (2, [2, 10]), (1, [10]), (5, [1, 2, 10])])
def test_pruning_keeps_the_newest_and_everything_else(tmp_path, keep, left):
    for step in (1, 2, 10):
        write(tmp_path, step)
    with staged_folder(tmp_path / "stage1"):
        pass
    (tmp_path / ".checkpoint-4.partial").mkdir()
    prune_checkpoints(tmp_path, keep)
    assert names(tmp_path) == sorted([*(f"checkpoint-{step}" for step in left), "stage1"])


def test_a_folder_that_cannot_be_written_is_named():
    """Permissions do not stop root, so root becomes somebody else for as long as it takes."""
    run = Path(tempfile.mkdtemp())
    write(run, 1)
    run.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written \(.*Permission denied"):
            write(run, 2)
        assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-1"]
    finally:
        if root:
            os.seteuid(0)
        run.chmod(0o755)
    assert names(run) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "file").write_text("weigh"), "file has 5 of 7 bytes"),
        (lambda path: (path / "sub" / "file").unlink(), "sub/file is missing"),
        (lambda path: (path / "COMPLETE").unlink(), r"not written to its end \(there is no COMPLETE"),
    ],
)
def test_a_checkpoint_that_lost_something_later_is_no_complete_one(tmp_path, harm, said):
    for step in (1, 2):
        write(tmp_path, step)
        (tmp_path / f"checkpoint-{step}" / "README.md").write_text("later")  # no harm
    assert damage(tmp_path / "checkpoint-2") is None
    harm(tmp_path / "checkpoint-2")
    assert re.search(said, damage(tmp_path / "checkpoint-2"))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert [path.name for path in all_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
