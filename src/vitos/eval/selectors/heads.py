"""Selectors that rank tokens by the checkpoint's evidence head (`vitos distill`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitos.core.stopwatch import Stopwatch
from vitos.engines.draws import head_scores
from vitos.engines.in_flight import run_early
from vitos.eval.selectors.base import NO_FUSION, Choice, Task, highest, selector
from vitos.policy.plans import get_plan
from vitos.policy.types import Query


@selector(title="One pass", plan="one_pass", rank=12)
def one_pass(task: Task, count: int) -> Choice:
    """The tokens of highest score; the others leave behind the head's layer, as in plan one_pass."""
    return Choice(highest(task.once("evidence_head", lambda: _scores(task)), count), plan="one_pass")


@selector(title="Evidence head", plan="one_pass", rank=13)
def evidence_head(task: Task, count: int) -> Choice:
    """The same tokens in a new prompt, without the others: what the choice is worth, whatever the first layers saw."""
    scores = task.once("evidence_head", lambda: _scores(task))
    return Choice(highest(scores, count), fusion=NO_FUSION, plan="two_pass")


@selector(title="Glance", plan="glance", rank=14)
def glance(task: Task, count: int) -> Choice:
    """The cells of highest score on the reduced image, which alone are encoded at full resolution (plan glance)."""
    seen = task.once("glance", lambda: _glanced(task))
    query = replace(seen, budget=count / task.grid.num_tokens)
    (found,) = get_plan("glance").reason(task.policy.branches, query, [()], Stopwatch())
    return Choice(found.kept.mask, fusion=NO_FUSION, prompt=found.prompt)


@torch.no_grad()
def _scores(task: Task) -> Tensor:
    """Scores of the visual tokens of all images, shape (N,)."""
    policy = task.policy
    if policy.spec.evidence_head is None:
        raise ValueError("vitos.json does not say how to use an evidence head; train one with `vitos distill`")
    (early,) = run_early(policy.engine, [task.prompt], [None], policy.spec.evidence_head.after)
    return head_scores(policy.backbone, task.prompt, early.states, task.grid.num_tokens)


@torch.no_grad()
def _glanced(task: Task) -> Query:
    """The question about the reduced images, with their scores."""
    plan, policy = get_plan("glance"), task.policy
    scan = plan.scan(policy.branches, [task.image(), *(other() for other in task.others)])
    scan = replace(scan, visuals=tuple(v.within(g.shown) for v, g in zip(scan.visuals, task.grid.images, strict=True)))
    query = replace(task.query, scan=scan)
    return plan.prepare(policy.branches, policy.engine, [query], Stopwatch())[0]
