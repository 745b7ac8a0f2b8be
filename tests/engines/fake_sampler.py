"""A stand-in for vLLM: another model with other weights, which samples with the torch engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.engines.base import Sampling
from vitos.engines.torch_engine import TorchEngine
from vitos.engines.vllm.engine import Received, Sampled, SampleRequest


class FakeSampler:
    """A `vitos.engines.vllm.engine.Sampler`.

    Args:
        backbone: the backbone whose model is copied.
        dtype: kept for the tests; the copy has the number format of the original.
        lost: part of the names of weights that never arrive.
        unwritten: part of the names of weights that arrive but are not written, without a message.
        noise: relative change of every weight on arrival, as by another number format.
    """

    def __init__(
        self, backbone: Backbone, dtype: str = "float32", lost: str = "", unwritten: str = "", noise: float = 0.0
    ) -> None:
        self.backbone = copy.copy(backbone)
        self.backbone.model = copy.deepcopy(backbone.model)
        self.dtype, self.lost, self.unwritten, self.noise = dtype, lost, unwritten, noise
        with torch.no_grad():
            for weight in self.backbone.model.parameters():
                weight.zero_()
        self.loads = 0
        self.requests: list[SampleRequest] = []

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        self.requests += requests
        engine, out = TorchEngine(self.backbone), []
        for request in requests:
            sampling = Sampling(request.max_tokens, request.temperature)
            ((c,),) = engine.sample([request.prompt], sampling, [[request.seed]])
            out.append(Sampled(c.token_ids.tolist(), c.logprobs.tolist(), c.finished))
        return out

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Received:
        own: dict[str, Any] = dict(self.backbone.model.named_parameters())
        draw = torch.Generator().manual_seed(self.loads)
        arrived, written = 0, set()
        for name, weight in weights:
            if self.lost and self.lost in name:
                continue
            arrived += 1
            written.add(name)
            if not (self.unwritten and self.unwritten in name):
                own[name].copy_(weight * (1 + self.noise * torch.randn(weight.shape, generator=draw)))
        self.loads += 1
        return Received(arrived, tuple(sorted(set(own) - written)))
