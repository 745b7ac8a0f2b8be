"""What a model needs before reinforcement learning pays, measured: `vitos doctor --recipe … --probe N`.

N training questions are rolled out as the recipe says, on this machine and with the torch engine. Reinforcement
learning sharpens what a model does now and then: it needs boxes that can be read, answers of which some are right and
some wrong, and rewards that differ within a group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group
from rich.table import Table

from vitos.config.options import DualStreamOptions
from vitos.core.record import Record
from vitos.doctor.machine import Check, checks_table
from vitos.engines.base import Sampling
from vitos.policy.vlm import SparseVLM
from vitos.rl.batch import count_with_signal
from vitos.rl.metrics import rollout_metrics
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.rollout import QuestionGroup, RolloutOptions, roll_out
from vitos.rl.schedule import LOCALIZATION, REASONING
from vitos.scans.cache import EmbeddingCache
from vitos.scans.store import ScanStore

READABLE = 0.5
"""Smallest share of localizations with boxes, and of reasonings with an answer, at which training pays: below it most
groups see the whole image, or learn the format alone. Half is ours; the trainer warns at the same rates."""
INFORMATIVE = 0.3
"""Smallest share of questions that a branch learns from. DAPO (arXiv 2503.14476) samples until all of them do."""
CUT_OFF = 0.2
"""Largest share of completions that end at their length limit."""
EASY, HARD = 0.95, 0.05
"""Accuracies beyond which nearly all groups agree."""
MARKED = 0.05
"""Smallest mean IoU at which boxes are more than guesses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Figures of rolled-out questions.

    Attributes:
        questions: number of questions.
        figures: as in the log of a training (docs/results.md).
        informative: share of the questions that each branch would learn from.
        seconds: time of one question's rollouts in stage 2 on this machine.
        update_seconds: time of the rollouts of one update of stage 2, if one process makes them.
        hours: time of the rollouts of all updates, if one process makes them.
        boxed: share of the questions that have gold boxes.
    """

    questions: int
    figures: dict[str, float]
    informative: dict[str, float]
    seconds: float
    update_seconds: float
    hours: float
    boxed: float

    @property
    def checks(self) -> tuple[Check, ...]:
        """What is ready, what is not, and what to do."""
        return tuple(_advice(self))


LOCALIZED = ("parse_rate", "accuracy/localization", "iou", "group_std/localization")


def probe(
    policy: SparseVLM,
    records: Sequence[Record],
    options: DualStreamOptions,
    weights: RewardWeights,
    extra: Sequence[ExtraReward] = (),
    *,
    questions: int,
    cache: EmbeddingCache | None = None,
) -> Probe:
    """Roll out questions as the updates of both stages would, with their group sizes.

    Args:
        policy: the model before training.
        records: the training questions; `questions` of them are drawn at random from the seed of `options`.
        options: group sizes, lengths, temperature, seed.
        weights, extra: the recipe's rewards.
        questions: number of questions, at least 1; no more than there are.
        cache: visual tokens of the images; None to compute them.

    Raises:
        ValueError: without questions.
    """
    if not records or questions < 1:
        raise ValueError("there are no training questions to probe; set data.train, and probe 1 or more")
    order = np.random.default_rng(options.seed).permutation(len(records))[:questions].tolist()
    chosen, store = [records[i] for i in order], ScanStore(policy, cache=cache)
    policy.backbone.model.eval()

    def rolled(localization_alone: bool) -> tuple[list[QuestionGroup], float]:
        """Groups of all questions, and the seconds of one."""
        size, groups, began = options.group_size(localization_alone), [], time.perf_counter()
        with policy.engine.using(policy.backbone.model, options.micro_batch_tokens):
            for start in range(0, len(chosen), options.questions_per_step):
                part = chosen[start : start + options.questions_per_step]
                batch = roll_out(policy, part, store.get(part), 0, _options(options, *size), weights, extra)
                groups += [group.without_embeddings() for group in batch.groups]
        return groups, (time.perf_counter() - began) / len(chosen)

    reasoned, each = rolled(False)
    # Stage 1 may have group sizes of its own.
    apart = options.group_size(True) != options.group_size(False)
    localized, first = rolled(True) if apart else (reasoned, each)
    steps = options.localization_steps if apart else 0
    total = (first * steps + each * (options.total_steps - steps)) * options.questions_per_step
    told = rollout_metrics(localized)
    return Probe(
        questions=len(chosen),
        figures=rollout_metrics(reasoned) | {name: told[name] for name in LOCALIZED},
        informative={
            branch: count_with_signal(groups, {branch: 1.0}, options) / len(chosen)
            for branch, groups in ((LOCALIZATION, localized), (REASONING, reasoned))
        },
        seconds=each,
        update_seconds=each * options.questions_per_step,
        hours=total / 3600,
        boxed=sum(bool(record.boxes) for record in chosen) / len(chosen),
    )


def _options(options: DualStreamOptions, num_localizations: int, num_reasonings: int) -> RolloutOptions:
    return RolloutOptions(
        num_localizations=num_localizations,
        num_reasonings=num_reasonings,
        localize=Sampling(options.max_localization_tokens, options.temperature),
        reason=Sampling(options.max_reasoning_tokens, options.temperature),
        seed=options.seed,
    )


def render_probe(found: Probe) -> Group:
    """The figures and what to do as two tables for the terminal."""
    table = Table(title=f"Probe: {found.questions} training questions", show_header=False, title_justify="left")
    for name, value in _shown(found):
        table.add_row(name, value)
    return Group(table, checks_table(found.checks))


def _shown(found: Probe) -> Iterator[tuple[str, str]]:
    figures = found.figures
    shares = {
        "localizations whose boxes can be read": "parse_rate",
        "reasonings without a readable answer": "no_answer_rate",
        "completions cut off by their limit": "truncated_rate",
        "accuracy of localizations": "accuracy/localization",
        "accuracy of reasonings": "accuracy/sparse",
        "mean IoU": "iou",
        "visual tokens kept": "kept_ratio",
        "questions whose rewards are all equal": "zero_std_rate",
    }
    yield from ((label, f"{figures[name]:.3f}") for label, name in shares.items())
    for branch, share in found.informative.items():
        yield f"questions that teach {branch}", f"{share:.3f}"
        yield f"spread of the {branch} rewards (std in a group)", f"{figures[f'group_std/{branch}']:.3f}"
    yield "rollouts of a question", f"{found.seconds:.2f} s on this machine"
    yield "rollouts of an update", f"{found.update_seconds:.1f} s in one process"
    yield "rollouts of the run", f"{found.hours:.2f} h in one process"


def _advice(found: Probe) -> Iterator[Check]:
    figures, start = found.figures, "start warm: vitos sft"
    yield _at_least("boxes", figures["parse_rate"], READABLE, "of the localizations can be read", start)
    longer = f"{start}, or lengthen max_reasoning_tokens"
    yield _at_least("answers", 1 - figures["no_answer_rate"], READABLE, "of the reasonings have an answer", longer)
    if found.boxed:
        remedy = f"{start}, and look whether model.coordinates is what the model writes"
        yield _at_least("places", figures["iou"], MARKED, "mean IoU with the gold boxes", remedy)
    yield _lengths(figures["truncated_rate"])
    yield _difficulty(figures["accuracy/sparse"], start)
    for branch, share in found.informative.items():
        remedy = "raise num_localizations, num_reasonings or temperature, or set train.oversampling_rounds"
        yield _at_least(f"signal of {branch}", share, INFORMATIVE, "of the questions have differing outcomes", remedy)


def _lengths(rate: float) -> Check:
    found = f"{rate:.2f} of the completions are cut off"
    if rate <= CUT_OFF:
        return Check("lengths", "ok", found)
    remedy = "lengthen max_localization_tokens and max_reasoning_tokens, or set train.mask_truncated"
    return Check("lengths", "warn", f"{found}, more than {CUT_OFF:g}", remedy)


def _difficulty(accuracy: float, start: str) -> Check:
    found = f"{accuracy:.0%} of the answers are right"
    if HARD <= accuracy <= EASY:
        return Check("difficulty", "ok", found)
    remedy = "use harder questions" if accuracy > EASY else f"use easier questions, or {start}"
    return Check("difficulty", "warn", found, remedy)


def _at_least(name: str, value: float, least: float, what: str, remedy: str) -> Check:
    if value >= least:
        return Check(name, "ok", f"{value:.2f} {what}")
    return Check(name, "warn", f"{value:.2f} {what}, less than {least:g}", remedy)
