"""Draws of visual tokens by the evidence head: sampled and scored like completions, whose tokens are cells.

A `CellPrompt` is a dense prompt that is completed by n of its visual tokens instead of text, drawn without
replacement by the head's scores (`core/plackett_luce.py`). So the loss of written boxes is also the loss of drawn
cells: `token_ids` are the cells in the order of the draws, `logprobs` the log-probability of each draw given the ones
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.core.plackett_luce import draw_order, order_entropies, order_logprobs
from vitos.core.prompt import Prompt
from vitos.engines.base import Completion, Sampling
from vitos.engines.in_flight import Runner, early_states, run_early
from vitos.engines.prefix import Prefix


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CellPrompt(Prompt):
    """A dense prompt that is completed by visual tokens; `after` says behind which layer the head reads it.

    Attributes:
        cells: number of visual tokens, over all images.
        count: number of them to draw.
    """

    cells: int
    count: int

    @classmethod
    def of(cls, dense: Prompt, *, after: int, cells: int, count: int) -> CellPrompt:
        """A dense prompt, to be completed by `count` of its `cells` visual tokens."""
        values = {name: getattr(dense, name) for name in Prompt.__dataclass_fields__}
        return cls(**values | {"after": after}, cells=cells, count=count)


def head_scores(backbone: Backbone, prompt: Prompt, states: Tensor | None, cells: int) -> Tensor:
    """The head's scores of a prompt's first `cells` visual tokens, given the states of all its tokens; (cells,).

    Raises:
        ValueError: if there is no head.
    """
    if backbone.evidence_head is None or states is None:
        raise ValueError("there is no evidence head, or no state that it could read; train one with `vitos distill`")
    scores: Tensor = backbone.evidence_head(states[prompt.is_visual][:cells], states[~prompt.is_visual])
    return scores


@torch.no_grad()
def sample_cells(
    engine: Runner,
    prompts: Sequence[CellPrompt],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
) -> list[list[Completion]]:
    """One draw per seed of each prompt; at temperature 0 the cells of highest score."""
    out: list[list[Completion]] = [[] for _ in prompts]
    for after in sorted({prompt.after or 0 for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if prompt.after == after]
        early = run_early(engine, [prompts[i] for i in rows], [prefixes[i] for i in rows], after)
        for i, run in zip(rows, early, strict=True):
            scores = _tempered(head_scores(engine.backbone, prompts[i], run.states, prompts[i].cells), sampling)
            out[i] = [_draw(scores, prompts[i].count, seed, sampling) for seed in seeds[i]]
    return out


def score_cells(
    engine: Runner, prompts: Sequence[CellPrompt], draws: Sequence[Sequence[Tensor]], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of given draws, differentiable in the head and the layers before it.

    Returns:
        Log-probability of each draw, the mask of the draws, and the entropy of the distribution of each draw; (R, L),
        0 on padding.
    """
    rows: list[Tensor] = []
    entropies: list[Tensor] = []
    states = early_states(engine, prompts)
    for prompt, own, orders in zip(prompts, states, draws, strict=True):
        scores = head_scores(engine.backbone, prompt, own, prompt.cells) / (temperature if temperature > 0 else 1.0)
        rows += [order_logprobs(scores, order.to(scores.device)) for order in orders]
        entropies += [order_entropies(scores, order.to(scores.device)) for order in orders]
    logprobs, spread = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, entropies))
    lengths = torch.tensor([len(row) for row in rows], device=logprobs.device)
    return logprobs, torch.arange(logprobs.shape[1], device=logprobs.device) < lengths[:, None], spread


def only_cells(prompts: Sequence[Prompt]) -> list[CellPrompt] | None:
    """The prompts, if all are completed by cells; None if none is.

    Raises:
        ValueError: for a mixture.
    """
    cells = [prompt for prompt in prompts if isinstance(prompt, CellPrompt)]
    if cells and len(cells) < len(prompts):
        raise ValueError("prompts that are completed by text and by cells cannot run in one batch; separate them")
    return cells or None


def _tempered(scores: Tensor, sampling: Sampling) -> Tensor:
    return scores / (sampling.temperature if sampling.temperature > 0 else 1.0)


def _draw(scores: Tensor, count: int, seed: int, sampling: Sampling) -> Completion:
    if sampling.temperature > 0:
        uniform = np.random.Generator(np.random.Philox(key=seed)).random(len(scores))
        order = draw_order(scores, count, torch.from_numpy(uniform).to(scores.device))
    else:
        order = torch.argsort(scores, descending=True, stable=True)[:count]
    return Completion(order.cpu(), order_logprobs(scores, order).cpu(), "", finished=True)
