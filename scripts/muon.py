"""The optimizers of the small models that are made here: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitos.backbones import Backbone


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al. 2024), for matrices; a float32 `torch.optim.Muon`.

    The latter iterates in bfloat16, which a CPU without matrix units for it only emulates (three times slower here).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with singular values of 1, by five Newton-Schulz iterations."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(backbone: Backbone, learning_rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms, biases and a projector."""
    named = [(name, p) for name, p in backbone.model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    adam = torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    return [Muon(matrices, lr=matrix_rate), adam]
