"""Dual-stream reinforcement learning. Read in this order:

1. `vitos/policy/plans/two_pass.py`: localize, keep, reason; the whole idea in 50 lines.
2. `rollout.py`: the same with samples, G localizations and G×K reasonings per question.
3. `rewards.py`: format, IoU and accuracy, and the cross-feedback λ between the branches.
4. `advantages.py`: a group's rewards become advantages.
5. `loss.py`: the clipped objective, O_i run once for its K advantages. `objectives.py`: its forms, one row each.
6. `update.py`: one update from top to bottom, with gradients.

That is the algorithm, about 850 lines. `docs/method.md` has the formulas; `docs/paper-map.md` says for each statement
whether it comes from the paper or from us. The rest is how it runs:

- `trainer.py`: `DualStreamTrainer`, a `transformers.Trainer`: stages, optimiser, files. `config.py`: its options.
- `schedule.py`: the branch trained at each update. `batch.py`: the part of the rollouts that a branch's loss needs.
- `first_update.py`: do sampler and policy agree, and do both see the image?
- `oversampling.py`: further questions for groups without signal. `guards.py`: updates that are refused, and warnings.
- `checkpoint.py`: folders that are complete or absent, and exact resume. `distributed.py`: several processes.
- `adapters.py`: LoRA. `sampler.py`: rollouts by vLLM. `user_rewards.py`: rewards from a user's file.
- `metrics.py`, `callbacks.py`: figures and samples in the log.
- `sft.py`: `SupervisedTrainer`, the supervised start. `lessons.py`: what it shows and asks.
"""
