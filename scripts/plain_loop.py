"""Supervised learning as a plain loop, for the small models that are made here with their own optimizers.

`vitos.rl.sft.SupervisedTrainer` is what `vitos sft` and a recipe's `warm_start` run; the tests compare the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from vitos.backbones.base import Backbone
from vitos.engines.torch_engine import TorchEngine
from vitos.rl.lessons import Lesson, supervised_loss


def train_supervised(
    backbone: Backbone,
    batches: Iterable[Sequence[Lesson]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup_share: float = 0.05,
    max_grad_norm: float = 1.0,
    answer_weight: float = 1.0,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train all weights that require gradients for `steps` batches under a one-cycle schedule.

    Args:
        backbone: the model.
        batches: batches of lessons; at least `steps` of them.
        steps: number of updates.
        learning_rate, weight_decay: options of AdamW.
        warmup_share: share of the steps in which the learning rate rises to its peak.
        max_grad_norm: largest norm of the gradient; larger ones are scaled down.
        answer_weight: weight of the answers' tokens, as in `supervised_loss`.
        optimizers: optimizers to use instead of AdamW, each with its peak learning rate.
        on_step: a function that gets the number of steps done and the loss.

    Raises:
        ValueError: if the batches run out, or a loss is not finite.
    """
    engine, parameters = TorchEngine(backbone), [p for p in backbone.model.parameters() if p.requires_grad]
    if optimizers is None:
        optimizers = [torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=warmup_share,
            cycle_momentum=False,
        )
        for optimizer in optimizers
    ]
    backbone.model.train()
    done = 0
    for done, lessons in enumerate(itertools.islice(batches, steps), start=1):
        loss = supervised_loss(engine, lessons, answer_weight)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {done} is {loss.item()}; lower the learning rate")
        backbone.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if on_step is not None:
            on_step(done, loss.item())
    backbone.model.eval()
    if done < steps:
        raise ValueError(f"the lessons ran out after {done} of {steps} steps")
