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


def without_adapters(model: Any) -> Any:
    """The model with the layers that PEFT has wrapped, as vLLM builds it."""
    for name, module in list(model.named_modules()):
        inner = getattr(module, "base_layer", getattr(module, "original_module", None))
        if inner is not None:
            model.set_submodule(name, inner)
    return model


class FakeSampler:
    """A `vitos.engines.vllm.engine.Sampler`.

    Args:
        backbone: the backbone whose model is copied.
        dtype: kept for the tests; the copy has the number format of the original.
        lost: part of the names of weights that never arrive.
        unwritten: part of the names of weights that arrive but are not written, without a message.
        noise: relative change of every weight on arrival, as by another number format.
        sleep_level: as in `VllmSampler`; the calls are in `calls`. While it sleeps, its weights are 0 and it refuses
            to generate; what it holds besides them is `ballast` bytes.
    """

    def __init__(
        self,
        backbone: Backbone,
        dtype: str = "float32",
        lost: str = "",
        unwritten: str = "",
        noise: float = 0.0,
        sleep_level: int = 0,
        ballast: int = 0,
    ) -> None:
        self.backbone = copy.copy(backbone)
        self.backbone.model = without_adapters(copy.deepcopy(backbone.model))
        self.dtype, self.lost, self.unwritten, self.noise = dtype, lost, unwritten, noise
        with torch.no_grad():
            for weight in self.backbone.model.parameters():
                weight.zero_()
        self.loads = 0
        self.sleep_level, self.ballast = sleep_level, ballast
        self.calls: list[str] = []
        self.cache: Tensor | None = torch.ones(ballast, dtype=torch.uint8)
        self.requests: list[SampleRequest] = []

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        if self.cache is None:
            raise RuntimeError("the sampler sleeps")
        self.requests += requests
        self.calls.append("generate")
        engine, out = TorchEngine(self.backbone), []
        for request in requests:
            sampling = Sampling(request.max_tokens, request.temperature)
            ((c,),) = engine.sample([request.prompt], sampling, [[request.seed]])
            out.append(Sampled(c.token_ids.tolist(), c.logprobs.tolist(), c.finished))
        return out

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Received:
        self.calls.append("load")
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

    @torch.no_grad()
    def sleep(self) -> None:
        if not self.sleep_level:
            return
        self.calls.append(f"sleep {self.sleep_level}")
        self.cache = None
        if self.sleep_level == 2:
            for weight in self.backbone.model.parameters():
                weight.zero_()

    def wake(self, part: str) -> None:
        if not self.sleep_level:
            return
        self.calls.append(f"wake {part}")
        if part == "kv_cache":
            self.cache = torch.ones(self.ballast, dtype=torch.uint8)
