"""Evidence heads: where in an image a question's answer is, read from hidden states inside the first pass.

`EvidenceHead` is ours: after layer k, a visual token v and the last token q of the prompt have the hidden states h_v
and h_q, and the score of the token is `⟨W_q LN(h_q), W_k LN(h_v)⟩ / √m + u LN(h_v)`. `GlimpseHead` is a rival: a
learned token reads the prompt, and its attention chooses. Both are some ten thousand weights, in a file of their own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_NAME = "evidence_head.safetensors"
HeadKind = Literal["pointer", "glimpse"]


class EvidenceHead(torch.nn.Module):
    """Scores of visual tokens from hidden states; float32, whatever the model's number format.

    >>> head = EvidenceHead(hidden=16, size=8)
    >>> head(torch.zeros(5, 16), torch.zeros(3, 16)).shape
    torch.Size([5])

    Args:
        hidden: size of a hidden state.
        size: m, size of the space in which question and tokens are compared.

    Attributes:
        plans: names of the plans that it was trained for; empty if nothing is said.
    """

    def __init__(self, hidden: int, size: int = 64) -> None:
        super().__init__()
        self.size = size
        self.plans: tuple[str, ...] = ()
        self.norm_question = torch.nn.LayerNorm(hidden)
        self.norm_token = torch.nn.LayerNorm(hidden)
        self.question = torch.nn.Linear(hidden, size)
        self.token = torch.nn.Linear(hidden, size)
        self.place = torch.nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Scores s_v, of which `sigmoid` is the probability of evidence.

        Args:
            tokens: hidden states of visual tokens, shape (V, hidden).
            text: hidden states of the prompt's other tokens, in its order, shape (Q, hidden).

        Returns:
            Scores, float32, shape (V,).
        """
        seen = self.norm_token(tokens.float())
        product = self.token(seen) @ self.asked(text.float())  # (V,)
        scores: Tensor = product / math.sqrt(self.size) + self.place(seen)[:, 0]
        return scores

    def asked(self, text: Tensor) -> Tensor:
        """What the tokens are compared with, shape (size,)."""
        asked: Tensor = self.question(self.norm_question(text[-1]))
        return asked

    def save(self, folder: Path) -> None:
        """Write the weights as `evidence_head.safetensors`."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / FILE_NAME, {"plans": ",".join(self.plans)} if self.plans else None)


class GlimpseHead(EvidenceHead):
    """The idea of GlimpsePrune (arXiv 2508.01548): a learned token behind the prompt, whose attention chooses.

    There the token runs through the model's layers, which are trained with it. Here the model is frozen: the token
    attends once to the text's states after layer k, and then to the visual tokens' (ours).
    """

    def __init__(self, hidden: int, size: int = 64) -> None:
        super().__init__(hidden, size)
        self.glimpse = torch.nn.Parameter(0.02 * torch.randn(hidden))
        self.read_query = torch.nn.Linear(hidden, size)
        self.read_key = torch.nn.Linear(hidden, size)
        self.read_value = torch.nn.Linear(hidden, hidden)

    def asked(self, text: Tensor) -> Tensor:
        normed = self.norm_question(text)  # (Q, hidden)
        weights = (self.read_key(normed) @ self.read_query(self.glimpse) / math.sqrt(self.size)).softmax(0)
        asked: Tensor = self.question(self.norm_question(self.glimpse + weights @ self.read_value(normed)))
        return asked


HEADS: dict[HeadKind, type[EvidenceHead]] = {"pointer": EvidenceHead, "glimpse": GlimpseHead}


def load_head(file: Path, kind: HeadKind, hidden: int) -> EvidenceHead:
    """Read the weights of a head for a model whose hidden states have `hidden` numbers.

    Raises:
        ValueError: if the file is missing, is no such head, or was made for another model.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing, though vitos.json names it; copy it, or train one: vitos distill")
    with safe_open(file, "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        said = (opened.metadata() or {}).get("plans", "")
    try:
        size, found = weights["question.weight"].shape
        head = HEADS[kind](found, size)
        head.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{file} holds no evidence head of kind {kind}: {error}") from error
    if found != hidden:
        raise ValueError(
            f"{file} reads hidden states of {found} numbers, but the model's have {hidden}; it belongs to another "
            "model"
        )
    head.plans = tuple(filter(None, said.split(",")))
    return head
