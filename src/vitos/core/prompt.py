"""A prompt as token ids, position ids and visual embeddings; dropping visual tokens from it; padding a batch.

Everything here is plain tensors: the backbone of a family decides what its placeholders and positions look like.
Axes: T tokens of a prompt, V visual tokens among them, N visual tokens of one image, B prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from vitos.core.geometry import Rect, TokenGrid
from vitos.core.sparsify import Fusion, fuse


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """The visual tokens of one whole image, after the encoder and its merger, as the language model would see them.

    Attributes:
        embeddings: the tokens, shape (N, hidden).
        grid: the cell of the image that each token looks at, N cells.
        resized: width and height in pixels of the image that the encoder saw, for native pixel coordinates.
        streams: extra visual streams into early layers (DeepStack), each (N, hidden).
    """

    embeddings: Tensor
    grid: TokenGrid
    _: KW_ONLY
    resized: tuple[int, int]
    streams: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.shape[0] != self.grid.num_tokens:
                raise ValueError(f"{tensor.shape[0]} visual tokens do not fit a grid of {self.grid.num_tokens} cells")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The embeddings and the streams."""
        return (self.embeddings, *self.streams)

    def within(self, crop: Rect) -> VisualTokens:
        """The same tokens, laid over the image that the encoder's picture was cut from; `crop` is the cropped part."""
        return replace(self, grid=self.grid.within(crop))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prompt:
    """One prompt, ready for the language model. Two prompts are equal only if they are the same object.

    Attributes:
        input_ids: token ids with one placeholder per visual token, shape (T,).
        position_ids: position of each token, shape (axes, T); 3 axes for M-RoPE, 1 otherwise.
        is_visual: True at the placeholders, bool, shape (T,).
        embeddings: the visual tokens in the order of the placeholders, shape (V, hidden), V = is_visual.sum().
        next_position: position of the first generated token, the same on all axes.
        streams: extra visual streams, each (V, hidden).
        hidden: True at visual tokens that no token behind the last visual token may look at (the `gather` plan), bool,
            shape (T,); None hides nothing.
        after: number of layers after which the hidden tokens leave the prompt (the `one_pass` plan): up to there all
            tokens of the prompt see one another, and generated tokens see no hidden token in any layer. None: they do
            not leave.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_visual: Tensor
    embeddings: Tensor
    next_position: int
    streams: tuple[Tensor, ...] = ()
    hidden: Tensor | None = None
    after: int | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def prefix_length(self) -> int:
        """Number of tokens up to the last visual one, which questions about the same image share; 0 without images."""
        return int(self.is_visual.nonzero()[-1]) + 1 if len(self.embeddings) else 0

    @property
    def cached_length(self) -> int:
        """Number of tokens whose keys and values a sampler holds: all but the hidden ones."""
        return len(self) - (0 if self.hidden is None else int(self.hidden.sum()))

    def head(self, length: int) -> Prompt:
        """The first `length` tokens, which must hold all visual tokens; generation goes on at the next position."""
        if bool(self.is_visual[length:].any()):
            raise ValueError(f"visual tokens lie behind the first {length} tokens of the prompt")
        if self.hidden is not None and self.after is None and length > self.prefix_length:
            raise ValueError(f"tokens are hidden from what follows the image, up to the head's end at {length}")
        return replace(
            self,
            input_ids=self.input_ids[:length],
            position_ids=self.position_ids[:, :length],
            is_visual=self.is_visual[:length],
            hidden=None,
            after=None,
            # Not the largest position so far plus one: a sparse prompt may have dropped the token that took it.
            next_position=int(self.position_ids[0, length]) if length < len(self) else self.next_position,
        )

    def tail(self, length: int) -> Prompt:
        """The tokens behind the first `length` ones, which must hold all visual tokens; positions do not change."""
        if bool(self.is_visual[length:].any()):
            raise ValueError(f"visual tokens lie behind the first {length} tokens of the prompt")
        return replace(
            self,
            input_ids=self.input_ids[length:],
            position_ids=self.position_ids[:, length:],
            is_visual=self.is_visual[length:],
            embeddings=self.embeddings[:0],
            streams=(),
            hidden=None,
            after=None,
        )

    def sparse(self, masks: Sequence[Tensor], fusion: Fusion = Fusion(), renumber: bool = False) -> Prompt:
        """This prompt with only the visual tokens of `masks`, the others fused into them.

        Kept tokens, later text and generated tokens stay at their dense positions (docs/method.md, section 4).
        Tokens are fused within their image; those of an image that keeps none are dropped.

        Args:
            masks: one bool mask for each image in the prompt, each (N_k,), together V.
            fusion: how the dropped tokens enter the kept ones.
            renumber: an ablation: consecutive positions as in text; destroys grounding.

        Raises:
            ValueError: if the masks do not fit the prompt, or keep no token at all.
        """
        keep = self._keep(masks)  # (T,)
        sources, start, parts = (self.embeddings, *self.streams), 0, []
        for mask in masks:
            own = [source[start : start + len(mask)] for source in sources]  # (N_k, hidden) each
            start += len(mask)
            none = tuple(source[:0] for source in own)
            parts.append(fuse(own, mask.to(keep.device), fusion) if bool(mask.any()) else none)  # (n_k, hidden)
        embeddings, *streams = (torch.cat(pieces) for pieces in zip(*parts, strict=True))  # (n, hidden)
        dropped = int((~keep).sum())
        positions = self.position_ids[:, keep]  # (axes, T - dropped)
        if renumber:
            positions = torch.arange(positions.shape[1], device=keep.device).expand(positions.shape[0], -1)
        return replace(
            self,
            input_ids=self.input_ids[keep],
            position_ids=positions,
            is_visual=self.is_visual[keep],
            embeddings=embeddings,
            streams=tuple(streams),
            next_position=len(self) - dropped if renumber else self.next_position,
        )

    def gather(self, masks: Sequence[Tensor]) -> Prompt:
        """This prompt with the visual tokens outside of `masks` hidden from all that follows the image.

        The visual tokens still see one another. This is the prompt of a sampler that runs system text and image
        densely and then keeps the keys and values of the kept tokens only.

        Args:
            masks: one bool mask for each image in the prompt, each (N_k,), together V.
        """
        keep = self._keep(masks)
        return self if bool(keep.all()) else replace(self, hidden=~keep)

    def prune(self, masks: Sequence[Tensor], after: int) -> Prompt:
        """This prompt with the visual tokens outside of `masks` dropped behind the first `after` layers.

        Args:
            masks: one bool mask for each image in the prompt, each (N_k,), together V.
            after: number of layers that see all tokens, at least 0.
        """
        if after < 0:
            raise ValueError(f"tokens are dropped after 0 or more layers, got {after}")
        return replace(self, hidden=~self._keep(masks), after=after)

    def _keep(self, masks: Sequence[Tensor]) -> Tensor:
        """True at text and at the visual tokens of `masks`, bool, shape (T,)."""
        if sum(len(m) for m in masks) != len(self.embeddings):
            raise ValueError(
                f"keep masks for {sum(len(m) for m in masks)} visual tokens do not fit a prompt with "
                f"{len(self.embeddings)}; pass one mask for each image of the dense prompt"
            )
        if not any(bool(mask.any()) for mask in masks):
            raise ValueError("no visual token is kept; use the dense prompt instead")
        keep = torch.ones_like(self.is_visual)
        keep[self.is_visual] = torch.cat(list(masks)).to(keep.device)
        return keep


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts padded to one length.

    Attributes:
        input_ids, attention_mask: the tokens, and 1 where they are not padding, shape (B, T).
        position_ids: the positions, 0 on padding, shape (axes, B, T).
        embeddings: all visual tokens, in the order of the batch, shape (sum of V, hidden).
        streams: extra visual streams, each shaped like `embeddings`.
        next_positions: position of the first generated token of each prompt, shape (B,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    embeddings: Tensor
    streams: tuple[Tensor, ...]
    next_positions: Tensor

    @property
    def lengths(self) -> Tensor:
        """Lengths without padding, shape (B,)."""
        return self.attention_mask.sum(-1)


def pad_prompts(prompts: Sequence[Prompt], pad_token_id: int, side: str = "left") -> PromptBatch:
    """Pad prompts to the longest; `side` is "left" (for generation) or "right". Nothing is ever truncated."""
    if not prompts:
        raise ValueError("an empty batch of prompts")
    if side not in ("left", "right"):
        raise ValueError(f"side must be left or right, got {side!r}")
    width = max(len(p) for p in prompts)
    axes, device = prompts[0].position_ids.shape[0], prompts[0].input_ids.device
    ids = torch.full((len(prompts), width), pad_token_id, device=device)  # (B, T)
    mask = torch.zeros(len(prompts), width, dtype=torch.long, device=device)  # (B, T)
    positions = torch.zeros(axes, len(prompts), width, dtype=torch.long, device=device)  # (axes, B, T)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place] = prompt.input_ids
        mask[row, place] = 1
        positions[:, row, place] = prompt.position_ids
    return PromptBatch(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        embeddings=torch.cat([p.embeddings for p in prompts]),
        # A prompt without an image has no streams.
        streams=tuple(torch.cat(x) for x in zip(*(p.streams for p in prompts if len(p.embeddings)), strict=True)),
        next_positions=torch.tensor([p.next_position for p in prompts], device=device),
    )
