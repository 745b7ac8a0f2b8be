"""The evidence head in a training: a part of the model that is optimized, but not of the weights in a checkpoint.

A checkpoint stays an ordinary one: the head is set aside while the model's weights are written or read, and has a file
of its own (`SparseVLM.save_beside`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitos.backbones.base import Backbone
from vitos.backbones.evidence_head import FILE_NAME, HEADS, load_head
from vitos.policy.vlm import SparseVLM

NAME = "evidence_head"


def join_head(policy: SparseVLM, *, sharded: bool) -> None:
    """Make the head a part of the model, if the policy's plan chooses by it; it is trained.

    Raises:
        ValueError: for a sharded model, whose parts run inside its forward pass only.
    """
    head = policy.backbone.evidence_head
    if head is None or policy.plan.localizes or not policy.plan.drops:
        return
    if sharded:
        raise ValueError(f"plan {policy.plan.name} cannot be trained with FSDP yet; use DDP, or plan two_pass")
    policy.backbone.model.add_module(NAME, head.requires_grad_(True))


def leave_head(backbone: Backbone) -> None:
    """Take the head out of the model, if it is in it."""
    if hasattr(backbone.model, NAME):
        delattr(backbone.model, NAME)


@contextmanager
def head_set_aside(backbone: Backbone) -> Iterator[None]:
    """While the block runs, the model is the ordinary one."""
    joined = hasattr(backbone.model, NAME)
    leave_head(backbone)
    try:
        yield
    finally:
        if joined and backbone.evidence_head is not None:
            backbone.model.add_module(NAME, backbone.evidence_head)


def read_head(backbone: Backbone, folder: Path) -> None:
    """Take the head's weights from a checkpoint, in place."""
    head = backbone.evidence_head
    if head is not None and hasattr(backbone.model, NAME):
        hidden = int(backbone.model.config.get_text_config().hidden_size)
        kind = next(kind for kind, made in HEADS.items() if type(head) is made)
        saved = load_head(folder / FILE_NAME, kind, hidden)
        head.load_state_dict(saved.state_dict())
