"""One evaluator: models × data sets × conditions, with each answer stored as it comes.

Read in this order:

- `conditions.py`: what can be asked (all tokens, own boxes, a selector at a budget, a changed image).
- `run.py` and `answer.py`: a run, batch by batch, and the answers to one batch; `store.py`: the folder of a run.
- `selectors/`: which tokens; `controls.py` and `image_ablations.py`: other tokens and other images.
- `scoring.py`: right, wrong or no answer; `statistics.py`, `seeds.py` and `comparison.py`: how sure a
  figure is.
- `evaluate.py`, `cases.py` and `results.py`: the preset of `vitos eval`. `bench.py`,
  `figures.py` and `leaderboard.py`: `vitos bench`.
- `datasets/`: published benchmarks as records; `lmms_plugin.py`: our model inside lmms-eval.

Figures are arithmetic on stored answers, and can be made again without a model. docs/results.md and docs/bench.md
explain them.
"""
