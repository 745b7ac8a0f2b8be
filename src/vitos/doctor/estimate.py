"""Memory of one update of a recipe, by arithmetic: pure functions, no torch. Its time: `speed.py`.

Two moments can be the peak. While completions are sampled, memory holds weights, optimizer state and the KV cache of
the siblings that run at once. While the loss is differentiated, it holds weights, gradients, optimizer state and the
activations of one micro-batch. `kept_by_layer` lists, tensor by tensor, what PyTorch's autograd keeps of a decoder
layer for the backward pass, for the layers of transformers (RMSNorm, rotary positions, grouped queries repeated for
SDPA under a block mask, gated feed-forward). `tests/doctor/test_estimate.py` compares the result with measured peaks
of small models, on a CPU in float32; layers with more than two norms (Gemma 3, Qwen3) keep a little more than is
counted here. Not compared: bfloat16, GPUs, sharding.

Memory is that of the worst case (largest image, longest completions, every box fallen back to the whole image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitos.doctor.shapes import ModelShape

Precision = Literal["float32", "bfloat16", "autocast"]
"""Activations in float32; weights and activations in bfloat16 (FSDP's mixed precision); float32 under autocast."""

# Copies, because the originals import torch; tests/doctor/test_estimate.py compares them.
HEAD_TOKENS = 512  # engines/chunked_logprobs.py:HEAD_TOKENS
CACHE_ROOM, CACHE_SHARE = 32, 0.25  # engines/kv_cache.py:ROOM, SHARE
SCAN_BYTES = 4 << 30  # scans/store.py:ScanStore, default of max_bytes
NF4_BYTES = (
    0.5 + 0.127 / 8
)  # per weight, with the constants of double quantisation (QLoRA, arXiv 2305.14314, section 3)
ASLEEP = 2 << 30  # what a sleeping vLLM still holds (CUDA graphs, workspaces): an assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmShare:
    """vLLM in a training process.

    Attributes:
        reserved: bytes that it takes while it is awake: weights, cache and workspace.
        cache: bytes of these for keys and values.
        sequences: largest number of sequences that run at once.
        sleep: 0: it keeps everything during the update; 1: its weights wait in the machine's memory; 2: they are
            dropped, because the next push brings new ones. At 1 and 2 the cache is dropped.
        shards: number of devices over which it splits the model.
    """

    reserved: int
    cache: int
    sequences: int
    sleep: int = 0
    shards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The part of a recipe that decides memory and time, on one of `devices` devices.

    Attributes:
        localize_tokens, reason_tokens: length of each branch's longest prompt, visual tokens included.
        visual_tokens: number of visual tokens of the largest image.
        max_localization_tokens, max_reasoning_tokens: length of each branch's longest completion.
        questions: number of questions per update on one device.
        num_localizations, num_reasonings: G and K, numbers of siblings behind one prompt.
        micro_batch_tokens: number of padded tokens that are scored at once.
        sampling_tokens: number of padded tokens that the torch engine samples at once; None: as many as are scored.
        weight_bytes: size of a frozen weight, and of a trained one as the checkpoint is loaded.
        trained_bytes: size of a trained weight and of an entry of its gradient.
        state_bytes: size of the optimizer's state per trained weight.
        nf4: whether the linear layers of the language model are kept in 4 bits.
        precision: number format of the activations.
        rank: rank of the adapters; None if the language model itself is trained.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        sharded: whether FSDP2 shards the model over `devices`; if not, each device holds all of it.
        references: number of frozen copies of the model in float32 (KL terms, frozen boxes).
        cosine: whether both branches' gradients are kept apart and compared.
        scans: number of distinct images whose visual tokens a device holds.
        kept_share: share of the visual tokens in a reasoning prompt, for the time only.
        vllm: the engine that samples, if it is not the trained model.
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
    sampling_tokens: int | None = None
    trained_bytes: int = 4
    state_bytes: float = 8.0
    nf4: bool = False
    rank: int | None = None
    checkpointing: bool = False
    devices: int = 1
    sharded: bool = False
    references: int = 0
    cosine: bool = False
    scans: int = 0
    kept_share: float = 0.77
    vllm: VllmShare | None = None

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


def batches(work: Workload, tokens: int | None = None) -> dict[str, tuple[SiblingBatch, int]]:
    """Per branch, the largest batch of `TorchEngine.score_batches` and the number of batches in an update.

    Args:
        tokens: number of padded tokens at once; None: `work.micro_batch_tokens`.
    """
    tokens = tokens or work.micro_batch_tokens
    localization = work.localize_tokens, work.num_localizations, work.max_localization_tokens
    reasoning = work.reason_tokens, work.num_reasonings, work.max_reasoning_tokens
    prompts = {"localization": work.questions, "reasoning": work.questions * work.num_localizations}
    out = {}
    for name, (prompt, siblings, longest) in {"localization": localization, "reasoning": reasoning}.items():
        batch = SiblingBatch(rows=1, prompt=prompt, siblings=siblings, longest=longest)
        rows = max(1, min(prompts[name], tokens // batch.row_tokens))
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
    resident = {
        "weights": weights_bytes(shape, work),
        "optimizer": round(work.state_bytes * trained) // work.shards,
        "reference models": work.references * 4 * (shape.text_parameters + shape.vision_parameters),
        "visual tokens": min(SCAN_BYTES, work.scans * work.visual_tokens * shape.hidden * work.weight_bytes),
    }
    gradients = resident | {
        "gradients": work.trained_bytes * trained // work.shards,
        "gradients apart": 16 * trained // work.shards if work.cosine else 0,
    }
    largest = shape.largest_matrix if work.rank is None else work.rank * max(shape.hidden, shape.intermediate)
    sampled = [batch for batch, _ in batches(work, work.sampling_tokens).values()]
    scored = [batch for batch, _ in batches(work).values()]
    asleep = {}
    if work.vllm is not None:
        rollouts = {"vLLM": work.vllm.reserved, "one weight on its way to vLLM": 4 * shape.largest_matrix}
        asleep = {"vLLM": ASLEEP if work.vllm.sleep else work.vllm.reserved}
    else:
        rollouts = _largest([_sampling(shape, work, batch) for batch in sampled])
    return Memory(
        sampling=_present(resident | rollouts),
        update=_present(gradients | asleep | _largest([_update(shape, work, batch) for batch in scored])),
        norm=_present(gradients | asleep | {"one gradient in float64, twice": 16 * largest // work.shards}),
    )


def weights_bytes(shape: ModelShape, work: Workload) -> int:
    """Bytes of all weights on one device, adapters included."""
    frozen = work.rank is not None
    size = float(work.weight_bytes if frozen else work.trained_bytes)
    quantized = shape.linear_parameters if work.nf4 else 0
    text = (shape.text_parameters - quantized) * size + quantized * NF4_BYTES
    adapters = trained_parameters(shape, work) * work.trained_bytes if frozen else 0
    return round(text / work.shards) + shape.vision_parameters * work.weight_bytes + adapters


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
        tokens = work.sampling_tokens or work.micro_batch_tokens
        rows = min(rows, max(1, tokens // batch.unshared_tokens))
        held, room, mask = batch.unshared_tokens, batch.siblings * cache_room(batch.prompt, 1, batch.longest), 0
    entry = rows * kv_entry_bytes(shape, work)
    prefill = batch.rows * batch.prompt * (small * (4 * shape.hidden + 3 * shape.intermediate) + batch.prompt * small)
    # Per sibling: the logits, their float32 logarithms, and two float64 copies on the way to the cumulative sum.
    logits = batch.rows * batch.siblings * shape.vocab * (4 + 4 + 8 + 8)
    return {
        "weights gathered for sampling": shape.text_parameters * small if work.sharded else 0,
        "KV cache": shape.layers * entry * room,
        "one token": max(prefill - shape.layers * entry * room, entry * held, mask, logits),
    }


def kv_entry_bytes(shape: ModelShape, work: Workload) -> int:
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
        head += shape.largest_matrix * work.trained_bytes * (1 if scored <= HEAD_TOKENS else 2)
    # Then layer by layer: its activations, if they were not kept, and the gradients of gate, up and their product on
    # their way through it. What the down projection kept for the last of them has been released by then.
    backward = again + tokens * 2 * shape.intermediate * small
    backward += shape.layer_parameters * work.trained_bytes if work.rank is None else 0
    if work.nf4:  # one matrix in 16 bits at a time
        backward += 2 * shape.hidden * shape.intermediate
    unsharded = 0
    if work.sharded:  # two layers and the root in the computing format, one layer's whole gradient
        unsharded = small * (2 * shape.layer_parameters + 2 * shape.largest_matrix) + 4 * shape.largest_matrix
    return {
        "activations": kept + ends,
        "head, or one layer's backward pass": max(head, backward),
        "weights gathered for a layer": unsharded,
    }
