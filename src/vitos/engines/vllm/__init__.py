"""vLLM as an engine. `engine.py`: sampled by vLLM, scored by us. `sampler.py`: vLLM in the process of training.

`plugin/` is loaded by vLLM, not by us: models that take part of an image's visual tokens. docs/vllm.md has the usage,
the limits and the measured agreement with the torch engine.
"""
