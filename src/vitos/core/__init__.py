"""Values and pure functions that everything else is built from: no model, no engine, no files.

Read in this order:

1. `geometry.py`: `Box`, and the grid of cells that an image's visual tokens look at.
2. `sparsify.py`: which tokens boxes keep (`select`, `Kept`), and how the others are fused into them (`fuse`).
3. `prompt.py`: a prompt as tensors; `Prompt.sparse` and `Prompt.gather` leave visual tokens out of it.
4. `response.py`: a model's text → boxes and an answer.
5. `record.py`: a question of a data set, with its answer and gold boxes.

The rest: `masks.py` (random, centre, inverted and other tokens at a given budget), `registry.py` (names of plans and
families from folders and entry points), `stopwatch.py` (seconds and tokens by span). docs/method.md, sections 1 to 5,
has the formulas.
"""
