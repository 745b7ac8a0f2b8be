"""Prompts that lose visual tokens behind their first layers, on the unmodified model (the `one_pass` plan).

    all tokens ─► layers 1..k ─► states of each token, keys and values
                                        │
    kept tokens ─► layers k+1..L ◄──────┘   decoding goes on behind the kept tokens' keys and values of all layers

The model's own forward pass runs twice, each time with a part of its layers. The second time, its embedding returns
the states after layer k, so that masks, positions and extra visual streams are made by the family's own code, for the
kept tokens. An extra stream that belongs to a layer behind k is cut by the same mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.backbones.patching import patched
from vitos.core.prompt import Prompt, PromptBatch, pad_prompts
from vitos.engines.batches import chunk_by_tokens
from vitos.engines.kv_cache import caching, growing_cache
from vitos.engines.prefix import Prefilled, Prefix, join, padded


class Runner(Protocol):
    """What is needed of an engine: `TorchEngine` has it."""

    backbone: Backbone
    model: Any
    max_batch_tokens: int


@torch.no_grad()
def run_early(
    engine: Runner, prompts: Sequence[Prompt], prefixes: Sequence[Prefix | None], layers: int
) -> list[Prefix]:
    """Run all tokens of prompts through the first layers, in batches that the engine allows.

    Args:
        engine: the engine whose model runs.
        prompts: B prompts, or their heads.
        prefixes: for each prompt the part that has run through these layers already, or None. A prompt that has run
            as a whole is not run again.
        layers: number of layers to run, 0..L.

    Raises:
        ValueError: for a prefix of another prompt, model or number of layers, or more layers than the model has.
    """
    _check_layers(engine.backbone, layers)
    for prompt, prefix in zip(prompts, prefixes, strict=True):
        if prefix is not None and not prefix.covers(replace(prompt, after=layers), engine.backbone.model):
            raise ValueError("a prefix belongs to another prompt, image or model; leave it out")
    done = {i: x for i, x in enumerate(prefixes) if x is not None and len(x) == len(prompts[i])}
    for known in (False, True):
        group = [i for i, x in enumerate(prefixes) if i not in done and (x is not None) == known]
        for chunk in chunk_by_tokens([(1, len(prompts[i])) for i in group], engine.max_batch_tokens):
            rows = [group[i] for i in chunk]
            found = _run_early(engine, [prompts[i] for i in rows], [x for i in rows if (x := prefixes[i])], layers)
            done |= dict(zip(rows, found, strict=True))
    return [done[i] for i in range(len(prompts))]


def _run_early(engine: Runner, prompts: Sequence[Prompt], known: Sequence[Prefix], layers: int) -> list[Prefix]:
    backbone = engine.backbone
    config, pad = backbone.model.config.get_text_config(), backbone.pad_token_id
    if known:
        tails = [prompt.tail(len(prefix)) for prompt, prefix in zip(prompts, known, strict=True)]
        batch = pad_prompts(tails, pad, side="left")
        cache, mask = join(known, [None] * len(known), config)
        mask = torch.cat([mask, batch.attention_mask], dim=1)
    else:
        batch, cache = pad_prompts(prompts, pad, side="left"), growing_cache(config, whole=True)
        mask = batch.attention_mask
    states = _states(engine, batch, cache, mask, layers)  # (B, T, hidden)
    entries = [(layer.keys, layer.values) for layer in cache.layers[:layers]]
    out = []
    for row, prompt in enumerate(prompts):
        seen = mask[row].bool()
        own = states[row, batch.attention_mask[row].bool()]  # (T,) or (T - prefix,)
        before = known[row].states if known else None
        own = own if before is None else torch.cat([before, own])
        pairs = tuple((keys[row][:, seen], values[row][:, seen]) for keys, values in entries)
        out.append(Prefix(replace(prompt, hidden=None, after=None), pairs, backbone.model, own))
    return out


def early_states(engine: Runner, prompts: Sequence[Prompt]) -> list[Tensor]:
    """States of all tokens of prompts after their `after` layers, each (T, hidden); differentiable."""
    layers = prompts[0].after
    if layers is None or any(prompt.after != layers for prompt in prompts):
        raise ValueError("the prompts of a batch must name the same number of layers after which the head reads them")
    _check_layers(engine.backbone, layers)
    batch = pad_prompts(prompts, engine.backbone.pad_token_id, side="left")
    states = _states(engine, batch, None, batch.attention_mask, layers)
    return [row[mask.bool()] for row, mask in zip(states, batch.attention_mask, strict=True)]


def _states(engine: Runner, batch: PromptBatch, cache: Any, mask: Tensor, layers: int) -> Tensor:
    """Hidden states of a batch after the first `layers` layers, shape (B, T, hidden)."""
    backbone, seen = engine.backbone, []

    def norm(states: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(states)
        return states[:, -1:]

    text = backbone.language_model
    inputs = backbone.model_inputs(batch) | {"attention_mask": mask}
    with _layers(backbone, slice(None, layers)), patched(text.norm, "forward", norm):
        engine.model(**inputs, **({"use_cache": False} if cache is None else caching(cache)), logits_to_keep=1)
    return seen[0]


def run_late(engine: Runner, prompts: Sequence[Prompt], early: Sequence[Prefix]) -> Prefilled:
    """Run the tokens that are left through the other layers; the caches of the first layers are cut alike."""
    backbone, config = engine.backbone, engine.backbone.model.config.get_text_config()
    layers = len(early[0].layers)
    kept = [torch.ones_like(p.is_visual) if p.hidden is None else ~p.hidden for p in prompts]  # each (T,)
    rows = [_left(p, x, k, layers) for p, x, k in zip(prompts, early, kept, strict=True)]
    batch = pad_prompts(rows, backbone.pad_token_id, side="left")
    given = early[0].states
    if given is None:
        raise ValueError("a prefix of all layers cannot go on in the middle; this is a bug, please report it")
    states = given.new_zeros(*batch.input_ids.shape, given.shape[-1])
    states[batch.attention_mask.bool()] = torch.cat([x.states[k] for x, k in zip(early, kept, strict=True)])  # type: ignore[index]
    cache = growing_cache(config)
    with ExitStack() as stack:
        stack.enter_context(_layers(backbone, slice(layers, None)))
        stack.enter_context(patched(backbone.model.get_input_embeddings(), "forward", lambda _: states))
        out = engine.model(**backbone.model_inputs(batch), **caching(cache), logits_to_keep=1)
    index, width = [k.nonzero()[:, 0] for k in kept], batch.input_ids.shape[1]
    for layer in range(layers):
        keys, values = (padded([x.layers[layer][part] for x in early], index, width) for part in (0, 1))
        cache.update(keys, values, layer)
    axes = batch.position_ids.shape[0]
    return Prefilled(out.logits[:, -1], cache, batch.attention_mask, batch.next_positions, axes)


def _left(prompt: Prompt, early: Prefix, kept: Tensor, layers: int) -> Prompt:
    """The tokens that are left, with their states in place of the embeddings of visual tokens."""
    if early.states is None or len(early) != len(prompt):
        raise ValueError("a prompt goes on in the middle only if all of it has run so far; this is a bug")
    visual = kept[prompt.is_visual]  # (V,)
    return replace(
        prompt,
        input_ids=prompt.input_ids[kept],
        position_ids=prompt.position_ids[:, kept],
        is_visual=prompt.is_visual[kept],
        embeddings=early.states[kept & prompt.is_visual],
        streams=tuple(stream[visual] for stream in prompt.streams[layers:]),
        hidden=None,
        after=None,
    )


@dataclass(slots=True)
class LateMask:
    """The attention mask of the layers behind the one after which tokens leave.

    Attributes:
        after: number of layers that see all tokens.
        mask: mask of the layers behind, shaped like that of the first ones.
        layers: indices of the layers that have used it.
    """

    after: int
    mask: Tensor
    layers: set[int] = field(default_factory=set)


_LATE = "vitos_late"


def attach_late_masks(backbone: Backbone, first: Any, late: Any, after: int) -> list[LateMask]:
    """Let the layers behind `after` use other attention masks than the first ones, in a scoring pass.

    The masks travel with those of the first layers, and hooks that stay on the layers take them from there: gradient
    checkpointing runs the layers again in the backward pass, when no `with` block is open any more.

    Args:
        backbone: the model.
        first, late: masks from `attention_masks`: one, or one per kind of layer.
        after: number of layers that use `first`.
    """
    for index, layer in enumerate(backbone.language_model.layers):
        if not hasattr(layer, _LATE):
            layer.register_forward_pre_hook(partial(_use_late_mask, index), with_kwargs=True)
            setattr(layer, _LATE, True)
    pairs = [(first[kind], late[kind]) for kind in first] if isinstance(first, dict) else [(first, late)]
    out = [LateMask(after, mask) for _, mask in pairs]
    for (mask, _), one in zip(pairs, out, strict=True):
        setattr(mask, _LATE, one)
    return out


def check_late_masks(backbone: Backbone, late: Sequence[LateMask], after: int) -> None:
    """Check that every layer behind `after` used its mask.

    Raises:
        ValueError: if one did not, so that log-probabilities would be those of another model.
    """
    used, all_of = set().union(*(one.layers for one in late)), set(range(after, len(backbone.language_model.layers)))
    if used != all_of:
        raise ValueError(
            f"layers {sorted(all_of - used)} of {type(backbone).__name__} do not take an attention mask of their own; "
            "its completions cannot be scored under plan one_pass"
        )


def _use_late_mask(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    late: LateMask | None = getattr(kwargs.get("attention_mask"), _LATE, None)
    if late is None or index < late.after:
        return None
    late.layers.add(index)
    return args, kwargs | {"attention_mask": late.mask}


@contextmanager
def _layers(backbone: Backbone, part: slice) -> Iterator[None]:
    """While the block runs, the language model has only some of its layers."""
    text = backbone.language_model
    kinds = getattr(text.config, "layer_types", None)
    with ExitStack() as stack:
        stack.enter_context(patched(text, "layers", text.layers[part]))
        if kinds is not None:
            stack.enter_context(patched(text.config, "layer_types", kinds[part]))
        yield


def _check_layers(backbone: Backbone, layers: int) -> None:
    count = len(backbone.language_model.layers)
    if not 0 <= layers <= count:
        raise ValueError(
            f"tokens are to leave after {layers} layers, but {type(backbone).__name__} has {count}; train an evidence "
            "head for this model with `vitos distill`"
        )
