"""The training of `small` with its language model: projector, new tokens, adapters. It can be stopped at any time.

The base's weights are frozen. Its products run in bfloat16 (`small/forward.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from small.forward import SCALE, Decoder
from small.lessons import Batch, Pictures, Teacher
from small.projector import CellTask, stacked, targets_of
from vitos.nano.small import FIRST, SECOND, new_tokens, shipped_weights
from vitos.policy.vlm import SparseVLM
from vitos.rl.lessons import pack_lessons

STATE = "state.pt"
CELL_WEIGHT, CELL_PICTURES = 0.5, 8  # of the projector's own task; pictures of it besides those of the lessons


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast.

    Attributes:
        minutes: all of the training, over all runs that share the folder.
        projector_share: share of it before the adapters move.
        look_steps: updates before all that, not counted in `minutes`: adapters and new tokens learn to look at
            the cell of a point, in soups, by attention alone (`Decoder.looks`).
        drills: soups in a step of these.
        pictures, soups: in a step.
        rank: of the adapters.
        attend: weight of looking at the evidence (`Decoder.loss`).
        adapter_rate, projector_rate, row_rate, look_rate: peak learning rates.
        keep_minutes, look_minutes: between two saves, and between two looks at held-out questions.
    """

    minutes: float
    projector_share: float = 0.1
    look_steps: int = 0
    drills: int = 4
    pictures: int = 4
    soups: int = 2
    rank: int = 16
    attend: float = 0.0
    adapter_rate: float = 1e-3
    projector_rate: float = 3e-4
    look_rate: float = 4e-3
    row_rate: float = 1e-3
    answer_weight: float = 2.0
    keep_minutes: float = 4.0
    look_minutes: float = 12.0
    seed: int = 0


class Run:
    """The model in training with its optimizer; `state.pt` in its folder.

    Args:
        policy: the untrained model (`build_small`), its projector and rows as they start.
        task: the projector's own task, as trained.
    """

    def __init__(self, policy: SparseVLM, task: CellTask, pictures: Pictures, plan: Plan, folder: Path) -> None:
        self.policy, self.task, self.pictures, self.plan, self.folder = policy, task, pictures, plan, folder
        self.model = policy.backbone.model
        torch.manual_seed(plan.seed)
        self.decoder = Decoder(self.model, new_tokens(), plan.rank, policy.backbone.banned_token_ids, torch.bfloat16)
        self.projector = self.model.model.multi_modal_projector
        self.projector.requires_grad_(True)
        adapters = [weight for pair in self.decoder.adapters().values() for weight in pair]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": adapters, "lr": plan.adapter_rate, "weight_decay": 0.01},
                {"params": [*self.projector.parameters(), *task.parameters()], "lr": plan.projector_rate},
                {"params": [self.decoder.rows], "lr": plan.row_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.teacher = Teacher(policy.backbone, pictures, policy.spec, seed=plan.seed)
        self.step, self.exercises, self.seconds = 0, 0, 0.0
        if (folder / STATE).is_file():
            self._load()

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * self.plan.minutes))

    def updates(self) -> Iterator[dict[str, float]]:
        """Updates until the time is up; figures of each."""
        while self.progress < 1:
            start = time.perf_counter()
            self.step += 1
            looks = self.step <= self.plan.look_steps
            figures = self._look() if looks else self._update()
            took = time.perf_counter() - start
            self.seconds += 0 if looks else took
            yield figures | {
                "step": self.step,
                "exercises": self.exercises,
                "seconds": took,
                "minutes": self.seconds / 60,
            }

    def _look(self) -> dict[str, float]:
        """An update of attention alone: soups of few tokens until it is found, then growing to whole grids."""
        plan, few = self.plan, 16
        grown = max(0.0, (self.step / plan.look_steps - 0.3) / 0.7)
        batch = self.teacher.batch(self.step, 0, [round(few * (256 / few) ** grown)] * plan.drills)
        packed = pack_lessons(self.policy.backbone, batch.lessons)
        for group, rate in zip(self.optimizer.param_groups, (plan.look_rate, 0.0, plan.look_rate), strict=True):
            group["lr"] = rate * min(1.0, self.step / 20)
        self.decoder.refresh()
        looks = self.decoder.looks(packed, batch.evidence)
        looks.backward()
        self.decoder.give_back()
        self.projector.zero_grad(set_to_none=True)
        norm = self._step(float(looks.detach()))
        return {"looks": float(looks.detach()), "norm": norm, "size": len(packed.prompts[0].embeddings)}

    def _step(self, loss: float) -> float:
        """The optimizer's step; norm of the gradient."""
        norm = float(nn.utils.clip_grad_norm_(self._trained(), 1.0))
        if not math.isfinite(loss + norm):
            raise ValueError(f"the loss of step {self.step} is {loss}, its gradient {norm}; lower the rates")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update(self) -> dict[str, float]:
        progress, plan = self.progress, self.plan
        self._set_rates(progress)
        rng = np.random.default_rng([plan.seed, self.step, 2])
        largest = round(8 * 32 ** min(1.0, progress / 0.35))  # soups grow to whole grids
        sizes = [int(rng.integers(max(8, largest // 2), largest + 1)) for _ in range(plan.soups)]
        batch = self.teacher.batch(self.step, plan.pictures, sizes)
        self.exercises += sum(len(lesson.exercises) for lesson in batch.lessons)
        packed = pack_lessons(self.policy.backbone, batch.lessons, plan.answer_weight)
        tokens = sum(len(p) + sum(map(len, ids)) for p, ids in zip(packed.prompts, packed.token_ids, strict=True))
        self.decoder.refresh(learns=progress >= plan.projector_share)
        answers, looks = self.decoder.loss(packed, batch.evidence if plan.attend else None)
        (answers if looks is None else answers + plan.attend * looks).backward()
        self.decoder.give_back()
        loss = float(answers.detach())
        cells, right, place = self._cells(batch, rng)
        norm = self._step(loss)
        seen = {} if looks is None else {"looks": float(looks.detach())}
        told = {"cells": cells, "named": right, "place": place}
        return {"loss": loss, "norm": norm, "tokens": tokens, **told, **seen}

    def _cells(self, batch: Batch, rng: np.random.Generator) -> tuple[float, float, float]:
        """Gradients of the projector: what the lessons say of its tokens, and its own task, also on other pictures."""
        others = rng.choice(len(self.pictures.records), min(CELL_PICTURES, len(self.pictures.records)), replace=False)
        index = np.concatenate([batch.index, np.sort(others)])
        tokens = self.projector(torch.from_numpy(self.pictures.features[index].astype(np.float32))).float()
        scenes = [(i, s) for i, k in enumerate(index) if (s := self.pictures.scenes[k]) is not None]
        loss, right, place = tokens.sum() * 0, float("nan"), float("nan")
        if scenes:
            own = stacked([targets_of(scene) for _, scene in scenes])
            loss, right, place = self.task(tokens[[i for i, _ in scenes]], *own)
        given = torch.zeros_like(tokens)
        if batch.tokens.grad is not None:
            given[: len(batch.index)] = batch.tokens.grad
        torch.autograd.backward([CELL_WEIGHT * loss, tokens], [None, given])
        return float(loss.detach()), right, place

    def _set_rates(self, progress: float) -> None:
        """A short rise, then a cosine; the adapters' begins when the projector has had its share."""
        share = self.plan.projector_share
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            begun = share if group is self.optimizer.param_groups[0] else 0.0
            own = (progress - begun) / (1 - begun)
            rise = min(1.0, own / 0.03)
            group["lr"] = peak * max(0.0, rise) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * max(own, 0.0))))

    # --- files ------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What ships."""
        adapters: dict[str, Tensor] = {}
        for name, (first, second) in self.decoder.adapters().items():
            adapters |= {f"{name}{FIRST}": first, f"{name}{SECOND}": SCALE * second}
        self.model.get_input_embeddings().weight.data[self.decoder.first_new :] = self.decoder.rows.detach()
        return shipped_weights(self.model, adapters)

    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self) -> None:
        """Write the state; a run that is killed meanwhile keeps the one before."""
        state = {
            "step": self.step,
            "exercises": self.exercises,
            "seconds": self.seconds,
            "plan": json.dumps(dataclasses.asdict(self.plan)),
            "trained": [p.detach() for p in self._trained()],
            "optimizer": self.optimizer.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / f".{STATE}")
        os.replace(self.folder / f".{STATE}", self.folder / STATE)

    @torch.no_grad()
    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.folder / STATE, weights_only=True)
        kept = json.loads(state["plan"])
        for name in ("rank", "seed"):
            if kept[name] != getattr(self.plan, name):
                raise ValueError(
                    f"{self.folder / STATE} was trained with {name} {kept[name]}, not {getattr(self.plan, name)}; go "
                    "on with that, or name another --work"
                )
        self.step, self.exercises, self.seconds = state["step"], state.get("exercises", 0), state["seconds"]
        for own, kept in zip(self._trained(), state["trained"], strict=True):
            own.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
