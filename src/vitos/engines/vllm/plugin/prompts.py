"""A `Prompt` as vLLM takes it: token ids, visual tokens and all positions, without any of vLLM's processors.

The visual tokens (pruned, fused, of a crop, from a cache) reach vLLM exactly as the torch engine sees them.
Completions of a prompt, and repeats of it, share their prefill through vLLM's prefix cache, which tells prompts apart
by the hash that is computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from vitos.core.prompt import Prompt
from vitos.engines.vllm.plugin.images import content_hash
from vitos.engines.vllm.plugin.request import EMBEDDINGS, POSITIONS


def engine_input(prompt: Prompt) -> Any:
    """The input for `LLMEngine.add_request`.

    Raises:
        ValueError: for prompts without images whose positions do not simply count from 0.
    """
    ids = prompt.input_ids.tolist()
    behind = torch.full((prompt.position_ids.shape[0], 1), prompt.next_position)
    positions = torch.cat([prompt.position_ids.cpu(), behind], dim=1).expand(3, -1).contiguous()
    if not bool(prompt.is_visual.any()):
        if not torch.equal(positions[0], torch.arange(len(ids) + 1)):
            raise ValueError(
                "vLLM counts the positions of a prompt without images itself, from 0; use the torch engine"
            )
        return tokens_input(ids)
    # Extra visual streams (DeepStack) of a token go over behind its embedding.
    embeddings = torch.cat([prompt.embeddings, *prompt.streams], dim=-1).detach().cpu()
    items, hashes, places, used = [], [], [], 0
    for first, length in _runs(prompt.is_visual):
        tokens = embeddings[used : (used := used + length)].contiguous()
        items.append(MultiModalKwargsItem({EMBEDDINGS: _elem(tokens), POSITIONS: _elem(positions, keep_on_cpu=True)}))
        hashes.append(content_hash(tokens, positions).hex())
        places.append(PlaceholderRange(offset=first, length=length))
    return mm_input(ids, MultiModalKwargsItems({"image": items}), {"image": hashes}, {"image": places})


def _runs(is_visual: Tensor) -> list[tuple[int, int]]:
    """First index and length of each run of visual tokens: an image, or several without text between them."""
    edges = torch.diff(is_visual.cpu().int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    firsts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [(first, end - first) for first, end in zip(firsts, ends, strict=True)]


def _elem(data: Tensor, keep_on_cpu: bool = False) -> MultiModalFieldElem:
    return MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=keep_on_cpu))
