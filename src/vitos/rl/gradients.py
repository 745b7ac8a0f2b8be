"""The gradients of one update: branch by branch, micro-batch by micro-batch, summed over processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vitos.policy.vlm import SparseVLM
from vitos.rl.batch import BranchBatch, localization_batch, reasoning_batch
from vitos.rl.checkpointed import CheckpointedTrainer
from vitos.rl.config import DualStreamConfig
from vitos.rl.distributed import gradient, gradient_norm, gradient_products, is_sharded, maximum, sum_gradients, sums
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.rollout import RolloutBatch
from vitos.rl.schedule import LOCALIZATION, REASONING, Stage


class GradientTrainer(CheckpointedTrainer):
    """Knows the loss of a rollout batch; where that comes from is a subclass's.

    The policy's engine scores; whoever calls has given it the model and the size of its micro-batches.
    """

    args: DualStreamConfig
    # References are fixed policies: the initial one, and the one of stage 1 from when stage 2 begins.
    _initial: SparseVLM | None = None
    _stage_one: SparseVLM | None = None

    def _backward(
        self,
        model: torch.nn.Module,
        batch: RolloutBatch,
        weights: Mapping[str, float],
        stage: Stage,
        step: int,
    ) -> tuple[float, float, dict[str, float]]:
        """Gradients of the weighted sum of the branches' losses, summed over processes; the loss, their norm, figures.

        The norm of each branch's gradient is logged where it costs nothing, that is where one branch is trained
        alone, and beside the cosine.
        """
        args = self.args
        every = args.log_gradient_cosine_steps or (1 if stage.name == "joint" else 0)
        cosine = every > 0 and step % every == 0
        metrics: dict[str, float] = {}
        total, trained, gradients = 0.0, [], {}
        # A branch that is measured only, not trained, runs first: its gradient is taken and then cleared.
        order = sorted((LOCALIZATION, REASONING), key=lambda name: weights.get(name, 0.0) > 0)
        before = torch.zeros((), device=args.device)
        for name in order:
            weight = weights.get(name, 0.0)
            guard = args.localization_kl if name == LOCALIZATION and self._stage_one is not None else 0.0
            if weight == 0 and guard == 0 and not cosine:
                continue
            branch = (localization_batch if name == LOCALIZATION else reasoning_batch)(batch, args)
            loss, figures = self._branch_backward(model, branch, weight if weight or guard else 1.0, guard, batch)
            metrics |= {f"{key}/{name}": value for key, value in figures.items()}
            if weight > 0 or guard > 0:
                total += loss
                trained.append(name)
            if cosine:
                now = gradient(model)
                gradients[name] = now - before
                if weight == 0 and guard == 0:
                    model.zero_grad()
                else:
                    before = now
        if sum(metrics[f"prompts/{name}"] for name in trained) > 0:
            sum_gradients(self.accelerator, model)
        norm = gradient_norm(self.accelerator, model)
        if cosine:
            (aa, ab), (_, bb) = gradient_products(self.accelerator, model, list(gradients.values()))
            metrics["gradient_cosine"] = ab / max((aa * bb) ** 0.5, 1e-16)
            metrics |= {f"gradient_norm/{name}": x**0.5 for name, x in zip(gradients, (aa, bb), strict=True)}
        elif len(trained) == 1:
            metrics[f"gradient_norm/{trained[0]}"] = norm
        return total, norm, metrics

    def _branch_backward(
        self, model: torch.nn.Module, branch: BranchBatch, weight: float, guard: float, batch: RolloutBatch
    ) -> tuple[float, dict[str, float]]:
        """Add one branch's gradients, micro-batch by micro-batch; the token mean runs over all processes' branch."""
        args, engine = self.args, self.policy.engine
        (tokens,) = sums(self.accelerator, [float(branch.tokens if branch.prompts else 0)])
        totals = dict.fromkeys(("loss", "tokens", "clipped", "mismatch_kl", "reference_kl"), 0.0)
        beta = max(args.kl_beta, guard)
        reference = (self._stage_one if guard > 0 else self._initial) if beta > 0 else None
        chunks = list(engine.score_batches(branch.prompts, branch.token_ids))
        passes = maximum(self.accelerator, len(chunks)) if is_sharded(model) else len(chunks)
        # FSDP divides gradients by the number of processes.
        factor = self.args.world_size if is_sharded(model) else 1
        for chunk in chunks:
            part = branch.part(chunk)
            scores = engine.score(part.prompts, part.token_ids, args.temperature)
            old, positive, negative = part.tensors(scores.logprobs)
            with torch.no_grad():
                known = None
                if reference is not None:
                    known = reference.engine.score(part.prompts, part.token_ids, args.temperature).logprobs
            out = policy_loss(
                LossInputs(
                    scores.logprobs, old, scores.mask, positive * weight, negative * weight, known, part.repeats
                ),
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                kl_beta=beta,
                denominator=max(1, int(tokens)),
                importance_cap=args.importance_cap if engine.samples_elsewhere else None,
            )
            self.accelerator.backward(out.loss * factor)
            for key in totals:
                totals[key] += float(out.loss.detach() if key == "loss" else getattr(out, key))
        self._keep_pace(batch, passes - len(chunks))
        values = sums(self.accelerator, [*totals.values(), branch.skipped, len(branch.prompts)])
        loss, scored, *figures, skipped, prompts = values
        means = {key: value / max(1.0, scored) for key, value in zip(list(totals)[2:], figures, strict=True)}
        return loss, {**means, "skipped_groups": skipped, "prompts": prompts}

    def _keep_pace(self, batch: RolloutBatch, missing: int) -> None:
        """Run empty micro-batches until this process has as many as the others, whose passes need its shards."""
        shortest = min(range(len(batch.groups)), key=lambda p: len(batch.localize_prompts[p]))
        ids = batch.groups[shortest].localizations[0].completion.token_ids[:1]
        for _ in range(missing):
            scores = self.policy.engine.score([batch.localize_prompts[shortest]], [[ids]], self.args.temperature)
            self.accelerator.backward(0.0 * scores.logprobs.sum())
