"""One policy used twice: a model that localizes evidence, then reasons from the visual tokens of that evidence.

Read in this order:

1. `vlm.py`: `SparseVLM` with `encode` and `ask`, the door for users.
2. `types.py`: its inputs and outputs, `Scan`, `Query`, `Finding`.
3. `plans/two_pass.py`, then `plans/base.py`: a plan decides which tokens each branch sees.
4. `branches.py`: the prompts and parsers that plans are built from.
5. `run.py`: runs a plan on an engine, for several questions together or token by token.

The rest: `spec.py` (`vitos.json`, the prompts and settings saved with a checkpoint) and `locate.py` (where a
checkpoint is). docs/architecture.md follows one question through these files.
"""
