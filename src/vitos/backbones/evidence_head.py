"""The evidence head: where in an image a question's answer is, read from hidden states inside the first pass.

After layer k, a visual token v and the last token q of the prompt have the hidden states h_v and h_q. The score of the
token is `⟨W_q LN(h_q), W_k LN(h_v)⟩ / √m + u LN(h_v)`: some ten thousand weights, in a file of their own.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE_NAME = "evidence_head.safetensors"


class EvidenceHead(torch.nn.Module):
    """Scores of visual tokens from hidden states; float32, whatever the model's number format.

    >>> head = EvidenceHead(hidden=16, size=8)
    >>> head(torch.zeros(5, 16), torch.zeros(16)).shape
    torch.Size([5])

    Args:
        hidden: size of a hidden state.
        size: m, size of the space in which question and tokens are compared.
    """

    def __init__(self, hidden: int, size: int = 64) -> None:
        super().__init__()
        self.size = size
        self.norm_question = torch.nn.LayerNorm(hidden)
        self.norm_token = torch.nn.LayerNorm(hidden)
        self.question = torch.nn.Linear(hidden, size)
        self.token = torch.nn.Linear(hidden, size)
        self.place = torch.nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor, question: Tensor) -> Tensor:
        """Scores s_v, of which `sigmoid` is the probability of evidence.

        Args:
            tokens: hidden states of visual tokens, shape (..., V, hidden).
            question: hidden state of the prompt's last token, shape (..., hidden).

        Returns:
            Scores, float32, shape (..., V).
        """
        seen, asked = self.norm_token(tokens.float()), self.norm_question(question.float())
        product = self.token(seen) @ self.question(asked)[..., None]  # (..., V, 1)
        scores: Tensor = (product / math.sqrt(self.size) + self.place(seen))[..., 0]
        return scores

    def save(self, folder: Path) -> None:
        """Write the weights as `evidence_head.safetensors`."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
            folder / FILE_NAME,
        )

    @classmethod
    def load(cls, file: Path, hidden: int) -> EvidenceHead:
        """Read the weights of a model whose hidden states have `hidden` numbers.

        Raises:
            ValueError: if the file is missing, is no such head, or was made for another model.
        """
        if not file.is_file():
            raise ValueError(f"{file} is missing, though vitos.json names it; copy it, or train one: vitos distill")
        weights = load_file(file)
        try:
            head = cls(weights["question.weight"].shape[1], weights["question.weight"].shape[0])
            head.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{file} holds no evidence head: {error}") from error
        if weights["question.weight"].shape[1] != hidden:
            raise ValueError(
                f"{file} reads hidden states of {weights['question.weight'].shape[1]} numbers, but the model's have "
                f"{hidden}; it belongs to another model"
            )
        return head
