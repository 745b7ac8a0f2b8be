"""Selectors that rank tokens by the checkpoint's evidence head (`vitos distill`)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitos.engines.draws import head_scores
from vitos.engines.in_flight import run_early
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, selector


@selector(title="One pass", needs=("evidence_head",), rank=12)
def one_pass(task: Task, count: int) -> Choice:
    """The tokens of highest score; the others leave behind the head's layer, as in plan one_pass."""
    return Choice(highest(task.once("evidence_head", lambda: _scores(task)), count), plan="one_pass")


@selector(title="Evidence head", needs=("evidence_head",), rank=13)
def evidence_head(task: Task, count: int) -> Choice:
    """The same tokens in a new prompt, without the others: what the choice is worth, whatever the first layers saw."""
    scores = task.once("evidence_head", lambda: _scores(task))
    return Choice(highest(scores, count), fusion=NO_FUSION, plan="two_pass")


@torch.no_grad()
def _scores(task: Task) -> Tensor:
    """Scores of the visual tokens of all images, shape (N,)."""
    policy = task.policy
    if policy.spec.evidence_head is None:
        raise ValueError("vitos.json does not say how to use an evidence head; train one with `vitos distill`")
    (early,) = run_early(policy.engine, [task.prompt], [None], policy.spec.evidence_head.after)
    return head_scores(policy.backbone, task.prompt, early.states, task.grid.num_tokens)
