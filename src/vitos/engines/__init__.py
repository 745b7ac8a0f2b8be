"""How tokens are sampled and scored. `torch_engine.py` is the default and the reference; `vllm/` samples faster.

Read in this order:

- `base.py`: `Sampling`, `Completion`, and `Engine`, what every engine can do.
- `torch_engine.py`: *prefill* prompts, *decode* their completions token by token, *score* given completions.
- What makes that cheap, one idea per file: `kv_cache.py` (a cache with room), `group_decode.py` (the completions of a
  prompt behind one copy of its cache), `packing.py` (the same for scoring, in one forward pass),
  `chunked_logprobs.py` (the output head in chunks), `prefix.py` (keys and values that several prompts share).
- `continuous_batching.py`: sequences that join and leave while others are decoded, for the server.
- `judge/`: a model on a server that grades answers in words.
- `vllm/`: the engine that samples with vLLM, and the plug-in with which vLLM runs our prompts.

State is in the model, in the cache and in the engine. A cache has one owner: whatever takes it over (`Siblings.of`,
`select`, `expand`) says so, and what it was taken from must not be used afterwards. Where the library's model must run
differently for one pass, `backbones/patching.py` changes it and restores it.
"""
