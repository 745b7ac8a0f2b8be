"""One update of the dual stream, from top to bottom: roll out, reward, advantages, loss, backward.

    questions ─► roll_out ─► rewards ─► advantages ─► policy_loss ─► gradients
                (rollout)   (rewards)   (advantages,      (loss)     (here, summed over processes)
                                         batch)

`DualStreamTrainer` calls `DualStreamUpdate.run` once per step. The formulas are in docs/method.md, sections 6 to 10.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator

from vitos.core.record import Record
from vitos.core.stopwatch import Stopwatch
from vitos.engines.base import Sampling
from vitos.engines.judge.judge import Judge
from vitos.policy.vlm import SparseVLM
from vitos.rl.batch import BranchBatch, count_with_signal, localization_batch, reasoning_batch
from vitos.rl.config import DualStreamConfig
from vitos.rl.distributed import (
    gathered,
    gradient,
    gradient_norm,
    gradient_products,
    is_sharded,
    maximum,
    reshard,
    runnable,
    sum_gradients,
    sums,
    whole_weights,
)
from vitos.rl.first_update import check_image, check_mismatch, image_effect
from vitos.rl.loss import LossInputs, policy_loss
from vitos.rl.memory import gib_in_use
from vitos.rl.metrics import rollout_metrics
from vitos.rl.objectives import LOSSES
from vitos.rl.oversampling import further_questions, joined, roll_out_until_full
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.rollout import QuestionGroup, RolloutBatch, RolloutOptions, roll_out
from vitos.rl.schedule import LOCALIZATION, REASONING, Stage
from vitos.rl.sharing import QuestionShares
from vitos.scans.store import ScanStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """The result of an update; the gradients of its last optimiser step are in the model.

    Attributes:
        loss: weighted sum of the branches' losses, over all processes; of the last optimiser step.
        norm: norm of the summed gradients of that step.
        groups: rollouts of all processes, without embeddings.
        metrics: figures for the log.
    """

    loss: float
    norm: float
    groups: list[QuestionGroup]
    metrics: dict[str, float]


@dataclass(kw_only=True)
class DualStreamUpdate:
    """Turns the questions of an update into gradients.

    Attributes:
        policy: the model that is trained.
        args: group sizes, losses and guards.
        accelerator: sums over processes.
        dataset: all training questions, for further ones where groups carry no signal.
        scans: visual tokens of the questions' images.
        reward_weights, reward_funcs: built-in and further rewards.
        initial: the policy before training, for `kl_beta`; None if it is not needed.
        stage_one: the policy between the stages, for the guards of stage 2; None until then.
        judge: grades answers in words; None: the rule scores all.
        shares: who asks which questions, if an engine other than the trained model writes.
    """

    policy: SparseVLM
    args: DualStreamConfig
    accelerator: Accelerator
    dataset: Sequence[Record]
    scans: ScanStore
    reward_weights: RewardWeights
    reward_funcs: Sequence[ExtraReward] = ()
    initial: SparseVLM | None = None
    stage_one: SparseVLM | None = None
    judge: Judge | None = None
    shares: QuestionShares = field(default_factory=QuestionShares)
    _checked: bool = False

    def run(
        self,
        model: torch.nn.Module,
        records: Sequence[Record],
        stage: Stage,
        step: int,
        descend: Callable[[float, float, Sequence[QuestionGroup]], None],
    ) -> Updated:
        """Roll out, reward, and back-propagate one update.

        Args:
            model: the network as the trainer wrapped it.
            records: questions of this process.
            stage: the stage that the update belongs to.
            step: number of the update, from 0; part of each seed.
            descend: makes an optimiser step from the gradients in the model and clears them, given their loss, their
                norm and their groups; called between the minibatches, not after the last one.

        Raises:
            ValueError: at the first update of this process, if sampler and policy disagree or do not see the image.
        """
        args, watch, weights = self.args, Stopwatch(), stage.branches(step)
        with self.policy.engine.using(runnable(model), args.micro_batch_tokens, args.sampling_batch_tokens):
            # 1) Both branches write, and every text is rewarded.
            model.eval()
            engine = self.policy.engine
            refreshed = engine.refresh()
            reshard(model)
            if engine.samples_elsewhere:
                records = self.shares.take(self.accelerator, records)
            rounds = self._roll_out(model, records, stage, step, watch)
            batch = joined(rounds)
            taken = {"memory/rollout": gib_in_use(args.device)}
            engine.release()
            with watch.span("wait"):
                self.accelerator.wait_for_everyone()
            if not self._checked:
                effect = image_effect(engine, self.accelerator, batch, args.temperature)
                check_image(effect, [record.id for record in records])
            # 2) Advantages, loss and gradients, branch by branch.
            model.train()
            with watch.span("update"):
                loss, norm, figures = self._minibatches(model, batch, stage, step, descend)
            taken["memory/update"] = gib_in_use(args.device)
        # 3) Figures and texts for the log.
        own = [[group.without_embeddings() for group in part.groups] for part in rounds]
        first, *further = (gathered(self.accelerator, groups) for groups in own)
        if engine.samples_elsewhere:
            first = self.shares.in_order(first)
        groups = [*first, *itertools.chain(*further)]
        self.shares.note(groups)
        highest = {name: maximum(self.accelerator, value) for name, value in taken.items()}
        metrics = rollout_metrics(groups) | refreshed | figures | highest
        if args.oversampling_rounds:
            metrics["oversampled_questions"] = float(len(groups) - len(first))
            metrics["unfilled_groups"] = float(len(first) - count_with_signal(groups, weights, args))
        metrics |= {f"seconds/{name}": value for name, value in watch.seconds.items()}
        metrics["seconds/wait"] = maximum(self.accelerator, watch.seconds["wait"])
        return Updated(loss=loss, norm=norm, groups=groups, metrics=metrics)

    # --- 1) rollouts ------------------------------------------------------------------------------------------------

    def _roll_out(
        self, model: torch.nn.Module, records: Sequence[Record], stage: Stage, step: int, watch: Stopwatch
    ) -> list[RolloutBatch]:
        """Rollouts of this process's questions, and of further ones where groups carry no signal."""
        args, weights = self.args, stage.branches(step)
        num_localizations, num_reasonings = args.group_size(set(weights) == {LOCALIZATION})
        options = RolloutOptions(
            num_localizations=num_localizations,
            num_reasonings=num_reasonings,
            localize=Sampling(args.max_localization_tokens, args.temperature),
            reason=Sampling(args.max_reasoning_tokens, args.temperature),
            seed=args.seed,
            dense=stage.dense,
        )

        def roll(questions: Sequence[Record]) -> RolloutBatch:
            with watch.span("encode"):
                scans = self.scans.get(questions)
            localizer = self.stage_one if args.frozen_boxes else None
            return roll_out(
                self.policy,
                questions,
                scans,
                step,
                options,
                self.reward_weights,
                self.reward_funcs,
                localizer,
                watch,
                self.judge,
            )

        resharded = is_sharded(model) and self.accelerator.state.fsdp_plugin.reshard_after_forward
        elsewhere = self.policy.engine.samples_elsewhere  # its weights need not be gathered
        with nullcontext() if elsewhere else whole_weights(model, resharded):
            return roll_out_until_full(
                self.accelerator,
                records,
                roll,
                partial(count_with_signal, weights=weights, options=args),
                partial(further_questions, self.dataset, seed=args.seed, step=step),
                args.oversampling_rounds,
            )

    # --- 2) gradients -----------------------------------------------------------------------------------------------

    def _minibatches(
        self,
        model: torch.nn.Module,
        batch: RolloutBatch,
        stage: Stage,
        step: int,
        descend: Callable[[float, float, Sequence[QuestionGroup]], None],
    ) -> tuple[float, float, dict[str, float]]:
        """Gradients of each minibatch, with an optimiser step between two of them; the last loss and norm, figures.

        Figures are means over the minibatches. Only `mismatch_kl` is that of the first one, in which the policy is
        still the one that sampled; `drift_kl` is that of the last one.
        """
        rows: list[dict[str, float]] = []
        loss = norm = 0.0
        parts = batch.parts(self.args.minibatches)
        for number, part in enumerate(parts):
            if number > 0:
                descend(loss, norm, parts[number - 1].groups)
            loss, norm, figures = self._backward(model, part, stage.branches(step), stage, step)
            rows.append(figures | {"loss/policy": loss})
            if not self._checked:
                check_mismatch(figures, self._mismatch_limit)
                self._checked = any(figures[name] for name in figures if name.startswith("prompts/"))
        if len(rows) == 1:
            return loss, norm, rows[0]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        kept = {name: value for name, value in rows[0].items() if name.startswith("mismatch_kl/")}
        drift = {f"drift_kl/{name.partition('/')[2]}": rows[-1][name] for name in kept}
        return loss, norm, means | kept | drift

    @property
    def _mismatch_limit(self) -> float | None:
        """The limit of the first update's mismatch; none where a frozen policy writes the boxes."""
        frozen = self.args.frozen_boxes and self.stage_one is not None
        return None if frozen else self.args.max_mismatch_kl

    def _backward(
        self,
        model: torch.nn.Module,
        batch: RolloutBatch,
        weights: Mapping[str, float],
        stage: Stage,
        step: int,
    ) -> tuple[float, float, dict[str, float]]:
        """Gradients of the weighted sum of the branches' losses, summed over processes; the loss, their norm, figures.

        The norm of each branch's gradient is logged with the cosine, and at no cost if one branch is trained alone.
        """
        args = self.args
        every = args.log_gradient_cosine_steps or (1 if stage.name == "joint" else 0)
        cosine = every > 0 and step % every == 0
        metrics: dict[str, float] = {}
        total, trained, gradients = 0.0, [], {}
        # A branch that is measured but not trained runs first: its gradient is taken and then cleared.
        order = sorted((LOCALIZATION, REASONING), key=lambda name: weights.get(name, 0.0) > 0)
        before = torch.zeros((), device=args.device)
        for name in order:
            weight = weights.get(name, 0.0)
            guard = args.localization_kl if name == LOCALIZATION and self.stage_one is not None else 0.0
            if weight == 0 and guard == 0 and not cosine:
                continue
            if cosine and weight == 0:
                # Measured, not trained: the gradient of the rewards, without a guard's.
                _, figures = self._branch_backward(model, name, batch, weight=1.0, guard=0.0)
                gradients[name] = gradient(model)
                model.zero_grad()
            if weight > 0 or guard > 0:
                loss, figures = self._branch_backward(model, name, batch, weight=weight, guard=guard)
                total += loss
                trained.append(name)
                now = gradient(model) if cosine else before
                if weight > 0 and cosine:
                    gradients[name] = now - before
                before = now
            metrics |= {f"{key}/{name}": value for key, value in figures.items()}
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
        self, model: torch.nn.Module, name: str, batch: RolloutBatch, *, weight: float, guard: float
    ) -> tuple[float, dict[str, float]]:
        """Add one branch's gradients, micro-batch by micro-batch; the token means run over all processes.

        A KL term acts on all completions of the branch, also on those of groups that the rewards say nothing about.
        """
        args, engine = self.args, self.policy.engine
        beta = max(args.kl_beta if weight > 0 else 0.0, guard)
        reference = (self.stage_one if guard > 0 else self.initial) if beta > 0 else None
        make = localization_batch if name == LOCALIZATION else reasoning_batch
        entropy_beta = args.entropy_beta if weight > 0 else 0.0
        branch = make(batch, args, everything=beta > 0 or entropy_beta > 0)
        mean, every = self._denominators(branch, name)
        names = ("loss", "tokens", "clipped", "mismatch_kl", "reference_kl", *(["entropy"] if entropy_beta else []))
        totals = dict.fromkeys(names, 0.0)
        chunks = list(engine.score_batches(branch.prompts, branch.token_ids))
        passes = int(maximum(self.accelerator, len(chunks))) if is_sharded(model) else len(chunks)
        # FSDP divides gradients by the number of processes.
        factor = args.world_size if is_sharded(model) else 1
        for chunk in chunks:
            part = branch.part(chunk)
            scores = engine.score(part.prompts, part.token_ids, args.temperature, entropy=entropy_beta > 0)
            old, positive, negative = part.tensors(scores.logprobs)
            with torch.no_grad():
                known = None
                if reference is not None:
                    with self.accelerator.autocast():  # in the number format of the policy
                        known = reference.engine.score(part.prompts, part.token_ids, args.temperature).logprobs
            out = policy_loss(
                LossInputs(
                    logprobs=scores.logprobs,
                    old_logprobs=old,
                    mask=scores.mask,
                    positive=positive * weight,
                    negative=negative * weight,
                    reference_logprobs=known,
                    entropies=scores.entropies,
                    repeats=part.repeats,
                ),
                form=args.loss,
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                kl_beta=beta if mean == every else beta * mean / every,
                entropy_beta=entropy_beta * mean / every,
                denominator=mean,
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

    def _denominators(self, branch: BranchBatch, name: str) -> tuple[int, int]:
        """What the sums of the policy gradient, and of terms on all completions, are divided by; of all processes."""
        args, form = self.args, LOSSES[self.args.loss]
        limit = args.max_localization_tokens if name == LOCALIZATION else args.max_reasoning_tokens
        own = (branch.mean_tokens, branch.mean_completions, branch.tokens, branch.all_completions)
        tokens, completions, all_tokens, all_completions = map(int, sums(self.accelerator, [float(n) for n in own]))
        return form.denominator(tokens, completions, limit), form.denominator(all_tokens, all_completions, limit)

    def _keep_pace(self, batch: RolloutBatch, missing: int) -> None:
        """Run empty micro-batches until this process has as many as the others, whose passes need its shards."""
        shortest = min(range(len(batch.groups)), key=lambda p: len(batch.localize_prompts[p]))
        ids = batch.groups[shortest].localizations[0].completion.token_ids[:1]
        for _ in range(missing):
            scores = self.policy.engine.score([batch.localize_prompts[shortest]], [[ids]], self.args.temperature)
            self.accelerator.backward(0.0 * scores.logprobs.sum())
