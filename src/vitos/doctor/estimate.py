"""Memory and time of one update of a recipe, by arithmetic: pure functions, no torch.

Two moments can be the peak. While completions are sampled, memory holds weights, optimizer state and the KV cache of
the siblings that run at once. While the loss is differentiated, it holds weights, gradients, optimizer state and the
activations of one micro-batch. `kept_by_layer` lists, tensor by tensor, what PyTorch's autograd keeps of a decoder
layer for the backward pass, for the layers of transformers (RMSNorm, rotary positions, grouped queries repeated for
SDPA under a block mask, gated feed-forward). `tests/doctor/test_estimate.py` compares the result with measured peaks
of small models, on a CPU in float32; layers with more than two norms (Gemma 3, Qwen3) keep a little more than is
counted here. Not compared: bfloat16, GPUs, sharding.

Memory is that of the worst case (largest image, longest completions, every box fallen back to the whole image). Time
is that of completions at their full length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitos.doctor.devices import Device
from vitos.doctor.shapes import ModelShape

Precision = Literal["float32", "bfloat16", "autocast"]
"""Activations in float32; weights and activations in bfloat16 (FSDP's mixed precision); float32 under autocast."""

# Copies, because the originals import torch; tests/doctor/test_estimate.py compares them.
HEAD_TOKENS = 512  # engines/chunked_logprobs.py:HEAD_TOKENS
CACHE_ROOM, CACHE_SHARE = 32, 0.25  # engines/kv_cache.py:ROOM, SHARE
SCAN_BYTES = 4 << 30  # scans/store.py:ScanStore, default of max_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The part of a recipe that decides memory and time, on one of `devices` devices.

    Attributes:
        localize_tokens, reason_tokens: length of each branch's longest prompt, visual tokens included.
        visual_tokens: number of visual tokens of the largest image.
        max_localization_tokens, max_reasoning_tokens: length of each branch's longest completion.
        questions: number of questions per update on one device.
        num_localizations, num_reasonings: G and K, numbers of siblings behind one prompt.
        micro_batch_tokens: number of padded tokens that are sampled or scored at once.
        weight_bytes: size of a weight as it is kept between updates.
        precision: number format of the activations.
        rank: rank of the adapters; None if the language model itself is trained.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        sharded: whether FSDP2 shards the model over `devices`; if not, each device holds all of it.
        references: number of frozen copies of the model in float32 (KL terms, frozen boxes).
        cosine: whether both branches' gradients are kept apart and compared.
        scans: number of distinct images whose visual tokens a device holds.
        kept_share: share of the visual tokens in a reasoning prompt, for the time only.
    """

    localize_tokens: int
    reason_tokens: int
    visual_tokens: int
    max_localization_tokens: int
    max_reasoning_tokens: int
    questions: int
    num_localizations: int
    num_reasonings: int
    micro_batch_tokens: int
    weight_bytes: int
    precision: Precision
    rank: int | None = None
    checkpointing: bool = False
    devices: int = 1
    sharded: bool = False
    references: int = 0
    cosine: bool = False
    scans: int = 0
    kept_share: float = 0.77

    @property
    def value_bytes(self) -> int:
        """Size of an activation in matrix products and of an entry of the KV cache."""
        return 4 if self.precision == "float32" else 2

    @property
    def shards(self) -> int:
        """Number of parts into which weights, gradients and optimizer state are split."""
        return self.devices if self.sharded else 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device by part, at three moments. Parts of size 0 are left out."""

    sampling: Mapping[str, int]
    update: Mapping[str, int]
    norm: Mapping[str, int]

    @property
    def moments(self) -> dict[str, Mapping[str, int]]:
        return {"sampling": self.sampling, "update": self.update, "gradient norm": self.norm}

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.moments.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SiblingBatch:
    """Prompts that run at once, each with its sibling completions.

    Attributes:
        rows: number of prompts.
        prompt: length of a prompt.
        siblings: number of completions per prompt.
        longest: length of the longest completion.
    """

    rows: int
    prompt: int
    siblings: int
    longest: int

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the prompt once, then all siblings."""
        return self.prompt + self.siblings * self.longest

    @property
    def unshared_tokens(self) -> int:
        """Tokens of all siblings, each behind a copy of the prompt."""
        return self.siblings * (self.prompt + self.longest)


def batches(work: Workload) -> dict[str, tuple[SiblingBatch, int]]:
    """Per branch, the largest batch of `TorchEngine.score_batches` and the number of batches in an update."""
    localization = work.localize_tokens, work.num_localizations, work.max_localization_tokens
    reasoning = work.reason_tokens, work.num_reasonings, work.max_reasoning_tokens
    prompts = {"localization": work.questions, "reasoning": work.questions * work.num_localizations}
    out = {}
    for name, (prompt, siblings, longest) in {"localization": localization, "reasoning": reasoning}.items():
        batch = SiblingBatch(rows=1, prompt=prompt, siblings=siblings, longest=longest)
        rows = max(1, min(prompts[name], work.micro_batch_tokens // batch.row_tokens))
        out[name] = replace(batch, rows=rows), -(-prompts[name] // rows)
    return out


def trained_parameters(shape: ModelShape, work: Workload) -> int:
    """Number of weights that have a gradient."""
    return shape.text_parameters if work.rank is None else work.rank * shape.adapted_widths


def kept_by_layer(shape: ModelShape, work: Workload, batch: SiblingBatch) -> int:
    """Bytes that one decoder layer keeps for its backward pass over packed rows.

    Per token, with width h, q = heads x head_dim and m = intermediate:
    for each of the two norms its input, its normalized input (only if the norm's weight is trained) and its output,
    which the linear layers behind it keep;
    queries, repeated keys and values, and attention's output (4 q), with one logarithm per head;
    gate, its activation, up and their product (4 m).
    Under autocast, norms are in float32 and each linear layer keeps a cast copy of its input.
    Per row, the block mask as numbers: row_tokens².
    """
    h, q, m = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    small = work.value_bytes
    middle = 0 if work.rank is not None else 1
    if work.precision == "float32":
        norms = 4 * 2 * (2 + middle) * h
    elif work.precision == "bfloat16":
        norms = 2 * (4 + 2 * middle + 2) * h
    else:
        norms = 2 * (4 + 4 * middle) * h + (3 + 2) * 2 * h
    adapters = 0 if work.rank is None else 7 * work.rank * small
    each = norms + small * (4 * q + 4 * m) + 4 * shape.heads + adapters
    return batch.rows * batch.row_tokens * (each + batch.row_tokens * small)


def memory(shape: ModelShape, work: Workload) -> Memory:
    """Bytes on one device at the moments that can be the peak."""
    trained = trained_parameters(shape, work)
    weights = shape.text_parameters * work.weight_bytes // work.shards + shape.vision_parameters * work.weight_bytes
    resident = {
        "weights": weights + (0 if work.rank is None else trained * 4),
        "optimizer": 8 * trained // work.shards,
        "reference models": work.references * 4 * (shape.text_parameters + shape.vision_parameters),
        "visual tokens": min(SCAN_BYTES, work.scans * work.visual_tokens * shape.hidden * work.weight_bytes),
    }
    gradients = resident | {
        "gradients": 4 * trained // work.shards,
        "gradients apart": 16 * trained // work.shards if work.cosine else 0,
    }
    largest = shape.largest_matrix if work.rank is None else work.rank * max(shape.hidden, shape.intermediate)
    parts = [batch for batch, _ in batches(work).values()]
    return Memory(
        sampling=_present(resident | _largest([_sampling(shape, work, batch) for batch in parts])),
        update=_present(gradients | _largest([_update(shape, work, batch) for batch in parts])),
        norm=_present(gradients | {"one gradient in float64, twice": 16 * largest // work.shards}),
    )


def _largest(candidates: Sequence[dict[str, int]]) -> dict[str, int]:
    return max(candidates, key=lambda parts: sum(parts.values()))


def _present(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def _sampling(shape: ModelShape, work: Workload, batch: SiblingBatch) -> dict[str, int]:
    """Bytes while the last token is sampled (cache, logits and the like), or of the prefill if that takes more."""
    small, rows = work.value_bytes, batch.rows
    held, room = batch.row_tokens, cache_room(batch.prompt, batch.siblings, batch.longest)
    # As bools, then as numbers.
    mask = rows * batch.siblings * batch.row_tokens * (1 + 5 * shape.heads // shape.kv_heads)
    if not shape.shares_prompt or batch.siblings == 1:
        rows = min(rows, max(1, work.micro_batch_tokens // batch.unshared_tokens))
        held, room, mask = batch.unshared_tokens, batch.siblings * cache_room(batch.prompt, 1, batch.longest), 0
    entry = rows * _kv_bytes(shape, work)
    prefill = batch.rows * batch.prompt * (small * (4 * shape.hidden + 3 * shape.intermediate) + batch.prompt * small)
    # Per sibling: the logits, their float32 logarithms, and two float64 copies on the way to the cumulative sum.
    logits = batch.rows * batch.siblings * shape.vocab * (4 + 4 + 8 + 8)
    return {
        "weights gathered for sampling": shape.text_parameters * small if work.sharded else 0,
        "KV cache": shape.layers * entry * room,
        "one token": max(prefill - shape.layers * entry * room, entry * held, mask, logits),
    }


def _kv_bytes(shape: ModelShape, work: Workload) -> int:
    """Bytes of one token's key and value in one layer."""
    return 2 * shape.kv_heads * shape.head_dim * work.value_bytes


def cache_room(prompt: int, siblings: int, longest: int) -> int:
    """Number of tokens per row that `engines/kv_cache.py` has made room for when the last token is sampled."""
    room = length = prompt
    for _ in range(longest - 1):
        length += siblings
        if length > room:
            room = length + max(CACHE_ROOM, int(CACHE_SHARE * length))
    return room


def _update(shape: ModelShape, work: Workload, batch: SiblingBatch) -> dict[str, int]:
    """Bytes of activations, and of the backward pass at its peak."""
    small = work.value_bytes
    tokens = batch.rows * batch.row_tokens
    stream = 4 if work.precision == "autocast" else small
    layer = kept_by_layer(shape, work, batch)
    if work.checkpointing:
        kept, again = shape.layers * tokens * shape.hidden * stream, layer
    else:
        kept, again = shape.layers * layer, 0
    # The last norm, the scored hidden states and the bool mask.
    ends = tokens * shape.hidden * (2 * stream + small) + batch.rows * batch.row_tokens**2
    scored = batch.rows * batch.siblings * batch.longest
    chunk = min(HEAD_TOKENS, scored)
    head = scored * shape.hidden * small + 16 * chunk * shape.vocab
    if work.rank is None:  # the head's weight has one gradient per chunk, and they are added up
        head += shape.largest_matrix * 4 * (1 if scored <= HEAD_TOKENS else 2)
    # Then layer by layer: its activations, if they were not kept, and the gradients of gate, up and their product on
    # their way through it. What the down projection kept for the last of them has been released by then.
    backward = again + tokens * 2 * shape.intermediate * small
    backward += shape.layer_parameters * 4 if work.rank is None else 0
    unsharded = 0
    if work.sharded:  # two layers and the root in the computing format, one layer's whole gradient
        unsharded = small * (2 * shape.layer_parameters + 2 * shape.largest_matrix) + 4 * shape.largest_matrix
    return {
        "activations": kept + ends,
        "head, or one layer's backward pass": max(head, backward),
        "weights gathered for a layer": unsharded,
    }


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the peaks that plain PyTorch reaches. They are guesses; replace them by a measurement of yours.

    Attributes:
        compute: share of `Device.flops` in prefill and update.
        bandwidth: share of `Device.bandwidth` while decoding.
        launch: least number of seconds that a layer takes per decoded token, whatever its size (Python, kernels).
    """

    compute: float = 0.35
    bandwidth: float = 0.6
    launch: float = 1e-3


def forward_flops(shape: ModelShape, rows: int, tokens: int, scored: int) -> float:
    """Number of operations in one forward pass: 2 per weight and token, plus attention over all pairs of tokens.

    A block mask saves no attention, because its kernels multiply hidden pairs too.

    Args:
        rows: number of rows.
        tokens: length of a row.
        scored: number of tokens whose logits are computed, in all rows together.
    """
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return rows * (2.0 * shape.active_parameters * tokens + attention) + 2.0 * shape.hidden * shape.vocab * scored


def seconds(
    shape: ModelShape, work: Workload, device: Device, assumed: Assumptions = Assumptions()
) -> dict[str, float]:
    """Seconds by part of one update that samples both branches and trains one of them, the more expensive one."""
    parts: dict[str, float] = {}
    update = 0.0
    dropped = round(work.visual_tokens * (1 - work.kept_share))
    passes = 3.0 if work.rank is None else 2.0  # without gradients of weights, the backward pass is half as long
    for name, (largest, count) in batches(work).items():
        batch = replace(largest, prompt=largest.prompt - dropped) if name == "reasoning" else largest
        siblings = batch.rows * batch.siblings
        prefill = count * forward_flops(shape, batch.rows, batch.prompt, batch.rows)
        parts[f"prefill, {name}"] = prefill / (assumed.compute * device.flops)
        cached = batch.prompt * (1 if shape.shares_prompt else batch.siblings) + batch.siblings * batch.longest / 2
        read = shape.active_parameters * work.value_bytes + batch.rows * shape.layers * _kv_bytes(shape, work) * cached
        token = max(read / (assumed.bandwidth * device.bandwidth), shape.layers * assumed.launch)
        parts[f"decode, {name}"] = count * batch.longest * token
        forward = count * forward_flops(shape, batch.rows, batch.row_tokens, siblings * batch.longest)
        update = max(update, (passes + work.checkpointing) * forward / (assumed.compute * device.flops))
    return parts | {"update": update}
