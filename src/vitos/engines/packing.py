"""Prompts and all their completions as rows of one forward pass: each prompt once, its siblings packed behind it.

A row is `prompt · completion 1 · completion 2 · …`. A block mask lets every completion see the prompt and itself, and
position ids let each go on where the prompt ends, so that no token can tell that it has siblings: log-probabilities
and gradients are those of separate runs. PrefixGrouper (arXiv 2506.05433) shows the idea for 1-D positions; here the
positions are the prompt's own, on as many axes as it has. Nothing needs a KV cache, so gradient checkpointing works,
and a wrapper such as FSDP sees one ordinary forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitos.backbones.base import layer_kinds
from vitos.core.prompt import Prompt, PromptBatch, pad_prompts


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B prompts with R completions of N tokens in all, as B rows of T tokens.

    Attributes:
        batch: the rows, padded on the right.
        segments: shape (B, T), 0 on the prompt, j on its completion j (from 1), -1 on padding.
        order: shape (B, T), place of the token in its own sequence, as if it had no siblings.
        sources: shape (N,), indices into B·T of the tokens whose hidden states predict the completions' tokens.
        targets: shape (N,), those tokens.
        mask: bool, shape (R, L): where the N tokens stand among the padded completions.
        hidden, late: bool, shape (B, T): visual tokens that the late ones (all behind the image) may not look at, as
            in `Prompt.gather`; None where no prompt hides any.
    """

    batch: PromptBatch
    segments: Tensor
    order: Tensor
    sources: Tensor
    targets: Tensor
    mask: Tensor
    hidden: Tensor | None = None
    late: Tensor | None = None

    def visible(self, window: int | None = None, visual: Tensor | None = None) -> Tensor:
        """Bool (B, 1, T, T), True where the query (third axis) may look at the key (fourth).

        Args:
            window: of sliding-window attention: a query sees the last `window` tokens of its own sequence.
            visual: bool (B, T), visual tokens of which each run attends to itself in both directions.
        """
        # Compared, not subtracted: B·T·T integers would be the largest tensor of a micro-batch.
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        here, there = self.order[:, :, None], self.order[:, None, :]
        seen = here >= there
        if visual is not None:
            begins = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
            run = begins.cumsum(1) * visual
            seen |= (run[:, :, None] == run[:, None, :]) & (run[:, None, :] > 0)
        if window is not None:  # of later tokens of an image, too, all are seen
            seen &= here < there + window
        seen &= ((key == 0) | (key == query)) & (key >= 0)
        if self.hidden is not None and self.late is not None:
            seen &= ~(self.late[:, :, None] & self.hidden[:, None, :])
        # Padding sees itself, since a softmax over nothing is not a number.
        return (seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device))[:, None]


def pack(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], pad_token_id: int) -> PackedBatch:
    """Put each prompt's completions (L,) behind it.

    Raises:
        ValueError: if the numbers of prompts and of groups of completions differ, or a completion is empty.
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
            # The prompt's last token predicts the first token, each token the next.
            before = torch.arange(end - 1, end - 1 + length, device=device)
            before[0] = len(prompt) - 1
            sources.append(row * width + before)
            end += length
    lengths = torch.tensor([len(ids) for ids in flat], device=device)
    hidden, late = _hiding(prompts, segments, order)
    return PackedBatch(
        batch=batch,
        segments=segments,
        order=order,
        sources=torch.cat(sources),
        targets=torch.cat([ids.to(device) for ids in flat]),
        mask=torch.arange(int(lengths.max()), device=device) < lengths[:, None],
        hidden=hidden,
        late=late,
    )


def _hiding(prompts: Sequence[Prompt], segments: Tensor, order: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`PackedBatch.hidden` and `late`: the rows of prompts that hide nothing have no hidden token."""
    if all(prompt.hidden is None for prompt in prompts):
        return None, None
    hidden = torch.zeros_like(segments, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if prompt.hidden is not None:
            hidden[row, : len(prompt)] = prompt.hidden
    ends = torch.tensor([prompt.prefix_length for prompt in prompts], device=segments.device)
    return hidden, (segments >= 0) & (order >= ends[:, None])


def attention_masks(
    packed: PackedBatch, config: Any, dtype: torch.dtype, visual: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """The block mask in the form that a Hugging Face model with this text config takes.

    Bool for SDPA, additive for eager attention; one for every kind of layer where a model has several. `visual` as in
    `PackedBatch.visible`.

    Raises:
        ValueError: for another attention implementation or kind of layer, which would ignore the mask.
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
    """A prompt and its completions in a row; the positions of each go on behind the prompt's last."""
    device = prompt.input_ids.device
    ids = torch.cat([prompt.input_ids, *(c.to(device) for c in completions)])
    after = [prompt.next_position + torch.arange(len(c), device=device) for c in completions]
    axes = prompt.position_ids.shape[0]
    return replace(
        prompt,
        input_ids=ids,
        position_ids=torch.cat([prompt.position_ids, *(p.expand(axes, -1) for p in after)], dim=1),
        is_visual=torch.cat([prompt.is_visual, prompt.is_visual.new_zeros(len(ids) - len(prompt))]),
        hidden=None,  # said by the mask
    )
