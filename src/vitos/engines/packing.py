"""Prompts and all their completions as rows of one forward pass: each prompt once, its completions packed behind it.

A row is `prompt, completion 1, completion 2, ...`. A block mask lets each completion see the prompt and itself, and
its position ids continue where the prompt ends, so that no token is influenced by a sibling: log-probabilities and
gradients are those of separate runs. PrefixGrouper (arXiv 2506.05433) shows the idea for 1-D positions; here the
positions are the prompt's, on as many axes as it has. No KV cache is needed, so gradient checkpointing works, and a
wrapper such as FSDP sees one ordinary forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitos.backbones.base import layer_kinds
from vitos.core.prompt import Prompt, PromptBatch, pad_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """B prompts with R completions, which have N tokens in total, as B rows of T tokens.

    Attributes:
        batch: the rows, padded on the right.
        segments: 0 on the prompt, j on its completion j (from 1), -1 on padding, shape (B, T).
        order: index of the token in the prompt and its completion, as if there were no siblings, shape (B, T).
        sources: indices into B * T of the tokens whose hidden states predict the completions, shape (N,).
        targets: the tokens to be predicted, shape (N,).
        mask: True where a completion padded to L tokens has one of the N, bool, shape (R, L).
        hidden: visual tokens that no late token may see, as in `Prompt.gather`, bool, shape (B, T); None if no prompt
            hides any.
        late: tokens that may not see the hidden ones: those after the last visual token of their prompt or, with
            `after`, those of the completions, bool, shape (B, T); None in the same case.
        after: number of layers for which all this holds; behind them, nothing sees a hidden token. None: all layers.
    """

    batch: PromptBatch
    segments: Tensor
    order: Tensor
    sources: Tensor
    targets: Tensor
    mask: Tensor
    hidden: Tensor | None = None
    late: Tensor | None = None
    after: int | None = None

    def behind(self) -> PackedBatch:
        """The same rows as the layers behind `after` see them: without the hidden tokens."""
        if self.hidden is None:
            return self
        return replace(self, order=self._left(self.hidden), late=torch.ones_like(self.hidden), after=None)

    def _left(self, hidden: Tensor) -> Tensor:
        """`order` among the tokens that are left, shape (B, T)."""
        before = (hidden.long().cumsum(1) - hidden.long()) * (self.segments == 0)
        return self.order - torch.where(self.segments > 0, hidden.sum(1, keepdim=True), before)

    def visible(self, window: int | None = None, visual: Tensor | None = None) -> Tensor:
        """True where the query (third axis) may see the key (fourth axis), bool, shape (B, 1, T, T).

        Args:
            window: size of the sliding window: a query sees the last `window` tokens of its sequence; None for all.
            visual: visual tokens whose runs attend to themselves in both directions, bool, shape (B, T).
        """
        # Compared, not subtracted: B * T * T integers would be the largest tensor of a micro-batch.
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        here, there = self.order[:, :, None], self.order[:, None, :]
        seen = here >= there  # (B, T, T)
        if visual is not None:
            begins = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
            run = begins.cumsum(1) * visual
            seen |= (run[:, :, None] == run[:, None, :]) & (run[:, None, :] > 0)
        if window is not None:  # has no effect on later tokens of the same image, which stay visible
            near = here < there + window
            if self.after is not None and self.hidden is not None and self.late is not None:
                left = self._left(self.hidden)  # what generated tokens find in the cache
                near = torch.where(self.late[:, :, None], left[:, :, None] < left[:, None, :] + window, near)
            seen &= near
        seen &= ((key == 0) | (key == query)) & (key >= 0)
        if self.hidden is not None and self.late is not None:
            seen &= ~(self.late[:, :, None] & self.hidden[:, None, :])
        # Padding sees itself, because a softmax over no values is not a number.
        return (seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device))[:, None]


def pack(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], pad_token_id: int) -> PackedBatch:
    """Put the completions of each prompt behind it.

    Args:
        prompts: B prompts.
        completions: the token ids of each prompt's completions, each of shape (L,).
        pad_token_id: token id of the padding.

    Raises:
        ValueError: if there is not one group of completions per prompt, or a completion is empty.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but completions for {len(completions)}")
    flat = [ids for siblings in completions for ids in siblings]
    if any(len(ids) == 0 for ids in flat):
        raise ValueError("a completion without tokens has nothing to score; leave it out")
    device = prompts[0].input_ids.device
    batch = pad_prompts(
        [_row(p, siblings) for p, siblings in zip(prompts, completions, strict=True)], pad_token_id, side="right"
    )
    rows, width = batch.input_ids.shape
    segments = torch.full((rows, width), -1, device=device)
    order = torch.zeros(rows, width, dtype=torch.long, device=device)
    sources = []
    for row, (prompt, siblings) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt)
        segments[row, :end], order[row, :end] = 0, torch.arange(end, device=device)
        for number, ids in enumerate(siblings, start=1):
            part, length = slice(end, end + len(ids)), len(ids)
            segments[row, part] = number
            order[row, part] = len(prompt) + torch.arange(length, device=device)
            # The prompt's last token predicts the completion's first; each token of the completion predicts the next.
            before = torch.arange(end - 1, end - 1 + length, device=device)
            before[0] = len(prompt) - 1
            sources.append(row * width + before)
            end += length
    lengths = torch.tensor([len(ids) for ids in flat], device=device)
    hidden, late, after = _hiding(prompts, segments, order)
    return PackedBatch(
        batch=batch,
        segments=segments,
        order=order,
        sources=torch.cat(sources),
        targets=torch.cat([ids.to(device) for ids in flat]),
        mask=torch.arange(int(lengths.max()), device=device) < lengths[:, None],
        hidden=hidden,
        late=late,
        after=after,
    )


def _hiding(
    prompts: Sequence[Prompt], segments: Tensor, order: Tensor
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """`hidden`, `late` and `after` of a `PackedBatch`; None for all if no prompt hides a token."""
    hiding = [prompt for prompt in prompts if prompt.hidden is not None]
    if not hiding:
        return None, None, None
    after = hiding[0].after
    if any(prompt.after != after for prompt in hiding):
        raise ValueError("prompts whose tokens leave at different layers cannot be scored in one batch; separate them")
    hidden = torch.zeros_like(segments, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if prompt.hidden is not None:
            hidden[row, : len(prompt)] = prompt.hidden
    if after is not None:
        return hidden, segments > 0, after
    ends = torch.tensor([prompt.prefix_length for prompt in prompts], device=segments.device)
    return hidden, (segments >= 0) & (order >= ends[:, None]), None


def attention_masks(
    packed: PackedBatch, config: Any, dtype: torch.dtype, visual: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """The block mask in the form that a Hugging Face model takes: bool for SDPA, additive for eager attention.

    Args:
        packed: the rows.
        config: text config of the model.
        dtype: number format of an additive mask.
        visual: see `PackedBatch.visible`.

    Returns:
        One mask (B, 1, T, T), or one per kind of layer if the model has several kinds.

    Raises:
        ValueError: for another attention function or kind of layer, which would ignore the mask.
    """
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"completions are scored with a block mask, which attn_implementation {implementation!r} does not take; "
            'load the model with attn_implementation "sdpa"'
        )
    window = getattr(config, "sliding_window", None)
    kinds = layer_kinds(config)
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{config.model_type} has {', '.join(sorted(unknown))}, which no block mask can express")
    masks = {kind: packed.visible(window if kind == "sliding_attention" else None, visual) for kind in kinds}
    if implementation == "eager":
        masks = {kind: _additive(mask, dtype) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _row(prompt: Prompt, completions: Sequence[Tensor]) -> Prompt:
    """A prompt and its completions in one row; the positions of each completion continue those of the prompt."""
    device = prompt.input_ids.device
    ids = torch.cat([prompt.input_ids, *(c.to(device) for c in completions)])
    after = [prompt.next_position + torch.arange(len(c), device=device) for c in completions]
    axes = prompt.position_ids.shape[0]
    return replace(
        prompt,
        input_ids=ids,
        position_ids=torch.cat([prompt.position_ids, *(p.expand(axes, -1) for p in after)], dim=1),
        is_visual=torch.cat([prompt.is_visual, prompt.is_visual.new_zeros(len(ids) - len(prompt))]),
        hidden=None,  # expressed by the mask
        after=None,
    )
