"""Memory and time of one update of a recipe, by arithmetic: pure functions, no torch.

Two peaks count. While completions are sampled: weights, optimizer state and the KV cache of the siblings that run at
once. While the loss is differentiated: weights, gradients, optimizer state and the activations of one micro-batch.
What a decoder layer keeps for its backward pass is listed in `kept_by_layer`, tensor by tensor, as PyTorch's autograd
keeps it for the layers of transformers (RMSNorm, rotary positions, grouped queries repeated for SDPA under a block
mask, gated feed-forward). `tests/doctor/test_estimate.py` compares with measured peaks of small models, on a CPU in
float32; layers with more norms than two (Gemma 3, Qwen3) keep a little more than is said here. Not compared:
bfloat16, GPUs, sharding.

Memory is that of the worst case (largest image, longest completions, every box fallen back to the whole image); time
is that of completions at their full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from vitos.doctor.devices import Device
from vitos.doctor.shapes import ModelShape

Precision = Literal["float32", "bfloat16", "autocast"]
"""Activations in float32; weights and activations in bfloat16 (FSDP's mixed precision); float32 under autocast."""

HEAD_TOKENS = 512  # as engines/chunked_logprobs.py, which imports torch
CACHE_ROOM, CACHE_SHARE = 32, 0.25  # as engines/kv_cache.py
SCAN_BYTES = 4 << 30  # as scans/store.py: visual tokens kept on the device


@dataclass(frozen=True, slots=True)
class Job:
    """What of a recipe decides memory and time, on one of `devices`.

    Attributes:
        localize_tokens, reason_tokens: of the longest prompts, visual tokens included.
        max_localization_tokens, max_reasoning_tokens: longest completions.
        questions: of one update on one device.
        micro_batch_tokens: padded tokens that are sampled or scored at once.
        weight_bytes: of a weight as it is kept between updates.
        precision: of activations.
        rank: of adapters; None: the language model is trained.
        checkpointing: activations of a layer are computed again in the backward pass.
        sharded: FSDP2 over `devices`; otherwise every device has everything.
        references: frozen copies of the model in float32 (KL terms, frozen boxes).
        cosine: gradients of both branches are kept apart and compared.
        scans: distinct images whose visual tokens a device holds.
        kept_share: of the visual tokens that a reasoning prompt has; for the time only.
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


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, by part, at three moments; a part that is not there is left out."""

    sampling: Mapping[str, int]
    update: Mapping[str, int]
    norm: Mapping[str, int]

    @property
    def moments(self) -> dict[str, Mapping[str, int]]:
        return {"sampling": self.sampling, "update": self.update, "gradient norm": self.norm}

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.moments.values())


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts of `rows` rows that run at once, each with `siblings` completions of at most `longest` tokens."""

    rows: int
    prompt: int
    siblings: int
    longest: int

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the prompt once, all siblings behind it."""
        return self.prompt + self.siblings * self.longest


def batches(job: Job) -> dict[str, tuple[Batch, int]]:
    """By branch: the largest batch of `TorchEngine.score_batches`, and how many there are in an update."""
    out = {}
    branches = {
        "localization": (job.questions, job.localize_tokens, job.num_localizations, job.max_localization_tokens),
        "reasoning": (
            job.questions * job.num_localizations,
            job.reason_tokens,
            job.num_reasonings,
            job.max_reasoning_tokens,
        ),
    }
    for name, (prompts, prompt, siblings, longest) in branches.items():
        batch = Batch(1, prompt, siblings, longest)
        rows = max(1, min(prompts, job.micro_batch_tokens // batch.row_tokens))
        out[name] = replace(batch, rows=rows), -(-prompts // rows)
    return out


def trained_parameters(shape: ModelShape, job: Job) -> int:
    """Weights with a gradient."""
    return shape.text_parameters if job.rank is None else job.rank * shape.adapted_widths


def kept_by_layer(shape: ModelShape, job: Job, batch: Batch) -> int:
    """Bytes that one decoder layer keeps for its backward pass over packed rows.

    For each token, of width h, q = heads x head_dim, m = intermediate: of both norms the input, the normalized input
    (only where the norm's weight is trained) and the output, which the linear layers behind it keep; queries, repeated
    keys and values, and attention's output (4 q) with a logarithm for each head; gate, its activation, up and their
    product (4 m). Under autocast norms are in float32 and every linear layer keeps a cast copy of its input. For each
    row, the block mask as numbers, row_tokens².
    """
    h, q, m = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    small = 4 if job.precision == "float32" else 2
    middle = 0 if job.rank is not None else 1
    if job.precision == "float32":
        norms = 4 * 2 * (2 + middle) * h
    elif job.precision == "bfloat16":
        norms = 2 * (4 + 2 * middle + 2) * h
    else:
        norms = 2 * (4 + 4 * middle) * h + (3 + 2) * 2 * h
    adapters = 0 if job.rank is None else 7 * job.rank * small
    each = norms + small * (4 * q + 4 * m) + 4 * shape.heads + adapters
    return batch.rows * batch.row_tokens * (each + batch.row_tokens * small)


def memory(shape: ModelShape, job: Job) -> Memory:
    """Bytes on one device at the moments that can be the peak."""
    shards = job.devices if job.sharded else 1
    trained = trained_parameters(shape, job)
    adapted = 0 if job.rank is None else trained * 4
    weights = shape.text_parameters * job.weight_bytes // shards + shape.vision_parameters * job.weight_bytes + adapted
    resident = {
        "weights": weights,
        "optimizer": 8 * trained // shards,
        "reference models": job.references * 4 * (shape.text_parameters + shape.vision_parameters),
        "visual tokens": min(SCAN_BYTES, job.scans * job.visual_tokens * shape.hidden * job.weight_bytes),
    }
    gradients = {"gradients": 4 * trained // shards} | (
        {"gradients apart": 16 * trained // shards} if job.cosine else {}
    )
    largest = shape.largest_matrix if job.rank is None else job.rank * max(shape.hidden, shape.intermediate)
    parts = batches(job)
    sampling = max((_sampling(shape, job, batch) for batch, _ in parts.values()), key=_total)
    update = max((_update(shape, job, batch) for batch, _ in parts.values()), key=_total)
    norm = {"one gradient in float64, twice": 16 * largest // shards}
    return Memory(
        _known(resident | sampling), _known(resident | gradients | update), _known(resident | gradients | norm)
    )


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _known(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def _sampling(shape: ModelShape, job: Job, batch: Batch) -> dict[str, int]:
    """Cache, logits and the like while the last token is sampled; larger than prefill's where siblings are many."""
    small = 4 if job.precision == "float32" else 2
    rows, held, room = batch.rows, batch.row_tokens, cache_room(batch.prompt, batch.siblings, batch.longest)
    mask = rows * batch.siblings * batch.row_tokens * (1 + 5 * shape.heads // shape.kv_heads)  # bool, then numbers
    if not shape.shares_prompt or batch.siblings == 1:
        rows = min(rows, max(1, job.micro_batch_tokens // (batch.siblings * (batch.prompt + batch.longest))))
        held, room, mask = (
            batch.siblings * (batch.prompt + batch.longest),
            batch.siblings * cache_room(batch.prompt, 1, batch.longest),
            0,
        )
    entry = 2 * shape.kv_heads * shape.head_dim * small * rows
    prefill = batch.rows * batch.prompt * (small * (4 * shape.hidden + 3 * shape.intermediate) + batch.prompt * small)
    # Of a sibling: the logits, their float32 logarithms, and two float64 copies on the way to the cumulated sum.
    logits = batch.rows * batch.siblings * shape.vocab * (4 + 4 + 8 + 8)
    whole = shape.text_parameters * small if job.sharded else 0
    return {
        "weights gathered for sampling": whole,
        "KV cache": shape.layers * entry * room,
        "one token": max(prefill - shape.layers * entry * room, entry * held, mask, logits),
    }


def cache_room(prompt: int, siblings: int, longest: int) -> int:
    """Tokens of a row that `engines/kv_cache.py` has made room for when the last token is sampled."""
    room = length = prompt
    for _ in range(longest - 1):
        length += siblings
        if length > room:
            room = length + max(CACHE_ROOM, int(CACHE_SHARE * length))
    return room


def _update(shape: ModelShape, job: Job, batch: Batch) -> dict[str, int]:
    small = 4 if job.precision == "float32" else 2
    tokens = batch.rows * batch.row_tokens
    stream = 4 if job.precision == "autocast" else small
    layer = kept_by_layer(shape, job, batch)
    if job.checkpointing:
        kept, again = shape.layers * tokens * shape.hidden * stream, layer
    else:
        kept, again = shape.layers * layer, 0
    # The last norm, the scored hidden states and the bool mask.
    ends = tokens * shape.hidden * (2 * stream + small) + batch.rows * batch.row_tokens**2
    scored = batch.rows * batch.siblings * batch.longest
    chunk = min(HEAD_TOKENS, scored)
    head = scored * shape.hidden * small + 16 * chunk * shape.vocab
    if job.rank is None:  # the head's weight has a gradient for each chunk, added up
        head += shape.largest_matrix * 4 * (1 if scored <= HEAD_TOKENS else 2)
    # Then layer by layer: what it keeps once more, where it was not kept, and the gradients on their way through it:
    # of gate, up and their product, where what the down projection had kept of the last is released already.
    backward = again + tokens * 2 * shape.intermediate * small
    backward += shape.layer_parameters * 4 if job.rank is None else 0
    unsharded = 0
    if job.sharded:  # two layers and the root in the computing format, one layer's whole gradient
        unsharded = small * (2 * shape.layer_parameters + 2 * shape.largest_matrix) + 4 * shape.largest_matrix
    return {
        "activations": kept + ends,
        "head, or one layer's backward pass": max(head, backward),
        "weights gathered for a layer": unsharded,
    }


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the peaks that plain PyTorch reaches; guesses to be replaced by a measurement of yours.

    Attributes:
        compute: of `Device.flops`, in prefill and in the update.
        bandwidth: of `Device.bandwidth`, while decoding.
        launch: seconds that a layer takes at least for each decoded token, whatever its size (Python, kernels).
    """

    compute: float = 0.35
    bandwidth: float = 0.6
    launch: float = 1e-3


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one update on one device; `flops` counts its products."""

    parts: Mapping[str, float]
    flops: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def forward_flops(shape: ModelShape, rows: int, tokens: int, scored: int) -> float:
    """Operations of one forward pass over rows of `tokens` tokens: 2 for each weight and token, attention over all
    pairs.

    A block mask saves nothing of attention, since its kernels multiply hidden pairs too.

    Args:
        scored: tokens whose logits are computed, in all rows together.
    """
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return rows * (2.0 * shape.active_parameters * tokens + attention) + 2.0 * shape.hidden * shape.vocab * scored


def seconds(shape: ModelShape, job: Job, device: Device, assumed: Assumptions = Assumptions()) -> Seconds:
    """Seconds of one update in which both branches are sampled and one, the dearer one, is trained."""
    parts: dict[str, float] = {}
    flops: dict[str, float] = {}
    update = 0.0
    dropped = round(job.visual_tokens * (1 - job.kept_share))
    for name, (batch, count) in batches(job).items():
        prompt = batch.prompt - (dropped if name == "reasoning" else 0)
        prefill = count * forward_flops(shape, batch.rows, prompt, batch.rows)
        row = prompt + batch.siblings * batch.longest
        passes = 3.0 if job.rank is None else 2.0  # without gradients of weights the backward pass is half as long
        scored = batch.rows * batch.siblings * batch.longest
        trained = count * (passes + job.checkpointing) * forward_flops(shape, batch.rows, row, scored)
        flops |= {f"prefill, {name}": prefill, f"update, {name}": trained}
        parts[f"prefill, {name}"] = prefill / (assumed.compute * device.flops)
        small = 4 if job.precision == "float32" else 2
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * small
        read = shape.active_parameters * small + batch.rows * cache * (
            prompt + batch.siblings * batch.longest / 2
            if shape.shares_prompt
            else batch.siblings * (prompt + batch.longest / 2)
        )
        token = max(read / (assumed.bandwidth * device.bandwidth), shape.layers * assumed.launch)
        parts[f"decode, {name}"] = count * batch.longest * token
        update = max(update, trained / (assumed.compute * device.flops))
    return Seconds(parts | {"update": update}, flops)
