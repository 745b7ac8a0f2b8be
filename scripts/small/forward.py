"""The language model of `small` in training: on one core in two thirds of the time that the library takes on two.

The loss is that of `PackedLessons.loss` (a test compares them, with their gradients); the way is another one:

- All tokens of a batch are one run without padding, so a linear layer is one product.
- Adapters are added to the weights once a step. Their gradients are taken from those of the weights.
- Attention is computed between tokens that see one another: a prompt with itself, an exercise with its prompt and
  itself. In packed rows, exercises are masked from each other, at full cost.
- Only tokens that are learned get logits.
- Where it is known which visual tokens answer an exercise, some heads are also told to look at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitos.nano.small import NUMBERS, TAGS
from vitos.rl.lessons import PackedLessons

SCALE = 2.0  # of an adapter's product: alpha over rank
WATCHED = (3, 5)  # layers whose heads are told where to look: the first of those that share keys
LEAST = 1e-3  # attention below which it hardly matters how little it is


@dataclass(frozen=True)
class Piece:
    """One lesson in the run of all tokens.

    Attributes:
        prompt, behind: lengths of its prompt and of all its exercises, which follow.
        rows: indices, from the first exercise's first token, of each exercise's tokens, (n, S); the last one again
            where it is shorter.
        back: places of these tokens in `rows.flatten()`, (behind,).
        causal: 0 where a token of the prompt sees another, else -inf, (P · share, P): a row for each of the heads that
            share keys.
        mask: the same within each exercise, (n, S · share, S).
        evidence: which tokens of the prompt answer each exercise, bool (n, P).
        told: which of the exercises' tokens are to look there, bool (n, S): those that predict a learned one and, if
            the question has a number, all from its last one on.
    """

    prompt: int
    behind: int
    rows: Tensor
    back: Tensor
    causal: Tensor
    mask: Tensor
    evidence: Tensor
    told: Tensor


@dataclass(frozen=True)
class Layout:
    """The T tokens of all lessons in a row: the first lesson's prompt, its exercises, the second's prompt, ...

    Attributes:
        ids, positions: (T,).
        visual: where `embeddings` belong, (T,).
        embeddings: the visual tokens, (V, hidden).
        pieces: the lessons.
        sources: tokens that predict one to be learned, (N,).
        targets, weights: that token and its weight, (N,).
    """

    ids: Tensor
    positions: Tensor
    visual: Tensor
    embeddings: Tensor
    pieces: list[Piece]
    sources: Tensor
    targets: Tensor
    weights: Tensor


def laid_out(
    packed: PackedLessons,
    share: int,
    dtype: torch.dtype,
    evidence: Sequence[Tensor] | None,
    numbers: range,
) -> Layout:
    """The layout of lessons, for `share` heads with common keys and masks of `dtype`.

    Args:
        evidence: of each lesson the visual tokens that answer its exercises, bool (n, visual tokens); none of a row's
            for an exercise of which that is not known. None: nothing is told.
        numbers: tokens that are numbers.
    """
    ids, positions, visual, pieces, sources, targets, weights = [], [], [], [], [], [], []
    start = 0
    for number, (prompt, rows) in enumerate(zip(packed.prompts, packed.rows, strict=True)):
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids[0])
        visual.append(prompt.is_visual)
        at, most = start + len(prompt), max(len(row.ids) for row in rows)
        begin, places, there = at, [], []
        for row in rows:
            length, (first, last) = len(row.ids), row.answer
            ids.append(row.ids)
            positions.append(prompt.next_position + torch.arange(length))
            visual.append(torch.zeros(length, dtype=torch.bool))
            places.append((at - begin + torch.arange(most)).clamp(max=at - begin + length - 1))
            there.append(torch.arange(most) < length)
            learned = torch.arange(row.asked, length)
            before = at + learned - 1
            if row.asked == 0:  # the prompt's last token predicts it
                before[0] = start + len(prompt) - 1
            sources.append(before)
            targets.append(row.ids[learned])
            weights.append(torch.where((learned >= first) & (learned <= last), packed.answer_weight, 1.0))
            at += length
        filled = torch.stack(there)
        seen = torch.ones(most, most, dtype=torch.bool).tril() & filled[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf")).repeat_interleave(share, 1)
        length = len(prompt)
        causal = torch.full((length, length), float("-inf"), dtype=dtype).triu(1).repeat_interleave(share, 0)
        back = filled.flatten().nonzero()[:, 0]
        own = torch.zeros(len(rows), length, dtype=torch.bool)
        if evidence is not None:
            own[:, prompt.is_visual] = evidence[number]
        first = torch.tensor([_first_told(row.ids.tolist(), row.asked, numbers) for row in rows])[:, None]
        ends, place = torch.tensor([len(row.ids) for row in rows])[:, None], torch.arange(most)
        told = (place >= first) & (place < ends - 1) & own.any(1, keepdim=True)
        pieces.append(Piece(length, at - begin, torch.stack(places), back, causal, mask, own, told))
        start = at
    return Layout(
        ids=torch.cat(ids), positions=torch.cat(positions), visual=torch.cat(visual),
        embeddings=torch.cat([prompt.embeddings for prompt in packed.prompts]), pieces=pieces,
        sources=torch.cat(sources), targets=torch.cat(targets), weights=torch.cat(weights),
    )  # fmt: skip


def _first_told(ids: Sequence[int], asked: int, numbers: range) -> int:
    return max((i for i in range(asked) if ids[i] in numbers), default=asked - 1)


class Fused:
    """Linear layers with one input as one product, each with an adapter.

    Args:
        layers: frozen layers without bias, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int) -> None:
        self.base = torch.cat([layer.weight.detach().float() for layer in layers.values()])
        self.sizes = [layer.out_features for layer in layers.values()]
        width = self.base.shape[1]
        self.first = {
            name: nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, width), 5**0.5)) for name in layers
        }
        self.second = {name: nn.Parameter(torch.zeros(layer.out_features, rank)) for name, layer in layers.items()}
        self.weight = self.base

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype, learns: bool) -> None:
        """Add the adapters as they are now to the weights."""
        added = torch.cat([self.second[name] @ self.first[name] for name in self.first])
        self.weight = torch.add(self.base, added, alpha=SCALE).to(dtype).requires_grad_(learns)

    @torch.no_grad()
    def give_back(self) -> None:
        """Gradients of the adapters from that of the weights."""
        if self.weight.grad is None:
            return
        for name, part in zip(self.first, self.weight.grad.float().split(self.sizes), strict=True):
            self.first[name].grad = SCALE * self.second[name].T @ part
            self.second[name].grad = SCALE * part @ self.first[name].T
        self.weight.grad = None


class Decoder:
    """A `LlavaForConditionalGeneration` on Llama, whose layers have adapters and whose last rows are trained.

    Args:
        model: the model, which stays as it is.
        new: number of rows of the embeddings, the last ones, that are trained.
        banned: tokens that are never an answer.
        dtype: number format of the products; what is added up is float32.
    """

    def __init__(self, model: Any, new: int, rank: int, banned: Sequence[int], dtype: torch.dtype) -> None:
        language = model.model.language_model
        self.config, self.dtype, self.rotary, self.norm = language.config, dtype, language.rotary_emb, language.norm
        embeddings = language.embed_tokens.weight.detach()
        self.old, self.first_new = embeddings[:-new].to(dtype), len(embeddings) - new
        self.rows = nn.Parameter(embeddings[-new:].clone())
        self.numbers = range(self.first_new + len(TAGS), self.first_new + len(TAGS) + len(NUMBERS))
        self.banned = torch.tensor([i for i in banned if i < self.first_new], dtype=torch.long)
        self.banned_new = torch.tensor([i - self.first_new for i in banned if i >= self.first_new], dtype=torch.long)
        self.layers = list(language.layers)
        self.products = []
        for number, layer in enumerate(self.layers):
            at, mlp, name = layer.self_attn, layer.mlp, f"model.language_model.layers.{number}"
            groups = (
                {f"{name}.self_attn.{k}_proj": getattr(at, f"{k}_proj") for k in "qkv"},
                {f"{name}.self_attn.o_proj": at.o_proj},
                {f"{name}.mlp.{k}_proj": getattr(mlp, f"{k}_proj") for k in ("gate", "up")},
                {f"{name}.mlp.down_proj": mlp.down_proj},
            )
            self.products.append([Fused(group, rank) for group in groups])

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Of each linear layer: (rank, in) and (out, rank); `SCALE` times their product is added to its weight."""
        return {name: (f.first[name], f.second[name]) for own in self.products for f in own for name in f.first}

    def refresh(self, learns: bool = True) -> None:
        """To be called before `loss` whenever adapters have changed; `learns`: whether they get gradients."""
        for own in self.products:
            for product in own:
                product.refresh(self.dtype, learns)

    def give_back(self) -> None:
        """To be called behind the backward passes."""
        for own in self.products:
            for product in own:
                product.give_back()

    def loss(self, packed: PackedLessons, evidence: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Weighted mean negative log-likelihood, and that of looking at the evidence; scalars.

        Their gradients reach rows, visual tokens and products. The second is the mean, over the tokens told and the
        heads of `WATCHED` layers, of -log(attention that the evidence gets); None if nothing is told.

        Args:
            evidence: as in `laid_out`.
        """
        laid = self._laid_out(packed, evidence)
        states, looks = self._run(laid, len(self.layers))
        hidden = self._normal(self.norm, states[laid.sources])
        old, rows = F.linear(hidden, self.old).float(), F.linear(hidden, self.rows.to(self.dtype)).float()
        if len(self.banned):
            old = old.index_fill(-1, self.banned, float("-inf"))
        rows = rows.index_fill(-1, self.banned_new, float("-inf"))
        own = laid.targets >= self.first_new
        chosen = torch.where(
            own,
            rows.gather(-1, torch.where(own, laid.targets - self.first_new, 0)[:, None])[:, 0],
            old.gather(-1, torch.where(own, 0, laid.targets)[:, None])[:, 0],
        )
        logprobs = chosen - torch.logaddexp(old.logsumexp(-1), rows.logsumexp(-1))
        return -(laid.weights * logprobs).sum() / laid.weights.sum(), looks

    def looks(self, packed: PackedLessons, evidence: Sequence[Tensor]) -> Tensor:
        """The second of `loss` alone, from the layers up to the last watched one: a fifth of the work.

        Raises:
            ValueError: if nothing is told.
        """
        _, looks = self._run(self._laid_out(packed, evidence), max(WATCHED) + 1)
        if looks is None:
            raise ValueError("no exercise of these lessons has evidence to look at")
        return looks

    def _laid_out(self, packed: PackedLessons, evidence: Sequence[Tensor] | None) -> Layout:
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        return laid_out(packed, share, self.dtype, evidence, self.numbers)

    def _run(self, laid: Layout, layers: int) -> tuple[Tensor, Tensor | None]:
        """States behind the first layers, (T, hidden), and how little they look at the evidence."""
        looks: list[Tensor] = []
        new = laid.ids >= self.first_new
        states = self.old[torch.where(new, 0, laid.ids)].float()
        states = torch.where(new[:, None], self.rows[torch.where(new, laid.ids - self.first_new, 0)], states)
        states = states.masked_scatter(laid.visual[:, None], laid.embeddings.float())
        cos, sin = (t[0, :, None] for t in self.rotary(states, laid.positions[None]))  # (T, 1, D)
        for number, (layer, products) in enumerate(zip(self.layers[:layers], self.products[:layers], strict=True)):
            into, out, up, down = (product.weight for product in products)
            given = F.linear(self._normal(layer.input_layernorm, states), into)
            seen = self._attend(given, cos, sin, laid.pieces, looks if number in WATCHED else None)
            states = states + F.linear(seen, out)
            gate, value = F.linear(self._normal(layer.post_attention_layernorm, states), up).chunk(2, dim=-1)
            states = states + F.linear(F.silu(gate) * value, down)
        seen = torch.cat(looks) if looks else torch.empty(0)
        return states, -(seen + LEAST).log().mean() if len(seen) else None

    def _normal(self, norm: Any, states: Tensor) -> Tensor:
        normal: Tensor = _Normal.apply(states, norm.weight.detach(), norm.variance_epsilon, self.dtype)
        return normal

    def _attend(
        self, given: Tensor, cos: Tensor, sin: Tensor, pieces: Sequence[Piece], looks: list[Tensor] | None
    ) -> Tensor:
        """(T, (heads + 2 · groups) · D) → (T, heads · D); `looks` gets the attention to the evidence."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = given.view(len(given), heads + 2 * groups, -1).split([heads, groups, groups], dim=1)
        width, share = q.shape[-1], heads // groups
        q, k = (_turned(q, cos, sin) * width**-0.5).to(self.dtype), _turned(k, cos, sin).to(self.dtype)
        # Queries of heads that share keys stand in one matrix, (groups, tokens · share, D).
        q = q.view(len(q), groups, share, width)
        sizes = [length for piece in pieces for length in (piece.prompt, piece.behind)]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        out = []
        for piece, (asked, keys, values), (q_own, k_own, v_own) in zip(pieces, parts, parts, strict=False):
            length = piece.prompt
            keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)  # (groups, D, P) and (groups, P, D)
            scores = asked.transpose(0, 1).reshape(groups, -1, width) @ keys
            seen = (scores + piece.causal).softmax(-1) @ values
            out.append(seen.view(groups, length, share, width).transpose(0, 1).reshape(length, -1))
            n, most = piece.rows.shape
            asked = q_own[piece.rows].permute(2, 0, 1, 3, 4).reshape(groups, n, -1, width)
            k_own, v_own = (t[piece.rows].permute(2, 0, 1, 3) for t in (k_own, v_own))  # (groups, n, S, D)
            far = (asked.flatten(1, 2) @ keys).view(groups, n, -1, length)
            near = asked @ k_own.transpose(2, 3) + piece.mask
            far, near = torch.cat([far, near], dim=-1).softmax(-1).split([length, most], dim=-1)
            if looks is not None:
                first = far.view(groups, n, most, share, length)[:, :, :, 0].float()
                looks.append((first * piece.evidence[:, None]).sum(-1)[:, piece.told].flatten())
            seen = (far.reshape(groups, -1, length) @ values).view(groups, n, -1, width) + near @ v_own
            rows = seen.view(groups, n * most, share, width).transpose(0, 1).reshape(n * most, -1)
            out.append(rows.index_select(0, piece.back))
        return torch.cat(out)


class _Normal(torch.autograd.Function):
    """RMS norm with fewer passes over memory than the library's; no gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vecdot(states, states)[:, None] / states.shape[-1] + epsilon)
        ctx.save_for_backward(states, weight, scale)
        return (states * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None, None]:
        states, weight, scale = ctx.saved_tensors
        gradient = given[0] * weight  # float32
        along = torch.linalg.vecdot(gradient, states)[:, None] * scale.pow(3) / states.shape[-1]
        return gradient.mul_(scale).addcmul_(states, along, value=-1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, float32."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
