"""Rewards of the two branches (docs/method.md, section 7): small pure functions, and their sums for one question.

For localization rollout `O_i` and its sparse rollouts `O'_ij`, i = 1..G, j = 1..K:

    r_ij  = w_f·format(O_i)   + w_iou·IoU(O_i) + w_a·acc(O_i)   + λ·acc(O'_ij)      localization branch
    r'_ij = w_f·format(O'_ij)                  + w_a·acc(O'_ij) + λ·acc(O_i)        reasoning branch

The λ terms are the cross-feedback: each branch is rewarded for its partner's accuracy. The terms and their places are
those of the paper; the weights are ours and come from the recipe.

Where a recipe names a judge, its grades are the accuracies of answers in words (`graded.py`). To add a reward, write
one function in a file and name it in the recipe as `file.py:function` (`extra.py`):

    def short(response: Response, record: Record) -> float | None:   # None abstains
        return -len(response.text) / 1000
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vitos.config.recipe import RewardsSection
from vitos.core.answers import score_answer_text
from vitos.core.geometry import matched_iou
from vitos.core.record import Record
from vitos.core.response import Response
from vitos.engines.judge.judge import Judge
from vitos.rl.extra import AnsweredQuestion, FloatArray, extra_terms
from vitos.rl.extra import Branch as Branch
from vitos.rl.extra import ExtraReward as ExtraReward
from vitos.rl.extra import RewardError as RewardError
from vitos.rl.extra import RewardFunction as RewardFunction
from vitos.rl.graded import Grades, grade_questions


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardWeights:
    """Weights of the terms, finite and >= 0; 0 switches a term off.

    >>> RewardWeights(iou=0.5)
    RewardWeights(format=0.2, iou=0.5, accuracy=1.0, feedback=0.5)

    Attributes:
        format: w_f, weight of the format.
        iou: w_iou, weight of the boxes' IoU with the gold boxes.
        accuracy: w_a, weight of the branch's accuracy.
        feedback: λ, weight of the partner's accuracy.

    Raises:
        ValueError: naming a weight that is negative or not finite.
    """

    # The defaults have one place, the recipe's section.
    format: float = RewardsSection.format  # w_f
    iou: float = RewardsSection.iou  # w_iou
    accuracy: float = RewardsSection.accuracy  # w_a
    feedback: float = RewardsSection.feedback  # λ

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"reward weight {field.name!r} must be finite and >= 0, got {value}")


@dataclass(frozen=True, slots=True, eq=False)
class GroupRewards:
    """Rewards of the G×K pairs of one question.

    Attributes:
        localization: rewards r_ij of the localization branch, shape (G, K).
        reasoning: rewards r'_ij of the reasoning branch, shape (G, K).
        terms: the terms before weighting, for the log; NaN where a reward abstained. `format`, `iou` and `accuracy`
            have shape (G,), `sparse_format` and `sparse_accuracy` (G, K). An extra reward has its name and shape (G,)
            for localization, and its name prefixed with `sparse_` and shape (G, K) for reasoning.
        graded: number of answers that a judge's grade was wanted for; None if a judge has no say in the question.
        ungraded: number of those without a grade; if there is one, all accuracies of the group are NaN.
    """

    localization: FloatArray
    reasoning: FloatArray
    terms: Mapping[str, FloatArray]
    graded: int | None = None
    ungraded: int = 0


def accuracy(response: Response, record: Record) -> float:
    """What the answer is worth, 0..1 (`vitos.core.answers`): 1 or 0 for letters, words and numbers; 0 without one."""
    return score_answer_text(response.answer, record)


def format_reward(response: Response) -> float:
    """1 if the text is exactly its branch's format, else 0."""
    return float(response.well_formed)


def iou_reward(response: Response, record: Record) -> float | None:
    """Mean IoU over the optimal matching of predicted and gold boxes, 0..1; 0 if no boxes could be read.

    None (abstains) if the record has no gold boxes. An empty tuple abstains as well: with nothing to find, all answers
    would score the same, and the term could only punish rollouts for boxes without a judgement.
    """
    if not record.boxes:
        return None
    return matched_iou(response.boxes, record.boxes)


def group_rewards(
    record: Record,
    localizations: Sequence[Response],
    reasonings: Sequence[Sequence[Response]],
    weights: RewardWeights,
    extra: Sequence[ExtraReward] = (),
    judge: Judge | None = None,
) -> GroupRewards:
    """Rewards of both branches for all rollouts of one question; arguments and errors as in `reward_questions`."""
    return reward_questions([AnsweredQuestion(record, localizations, reasonings)], weights, extra, judge)[0]


def reward_questions(
    questions: Sequence[AnsweredQuestion],
    weights: RewardWeights,
    extra: Sequence[ExtraReward] = (),
    judge: Judge | None = None,
) -> list[GroupRewards]:
    """Rewards of both branches for all rollouts of some questions; what has to be waited for is asked for together.

    Args:
        questions: the questions with their rollouts; row i of the reasonings is conditioned on the boxes of O_i.
        weights: weights of the built-in terms.
        extra: a user's rewards, added to the sums of their branch.
        judge: grades the answers of its kinds in place of the rule.

    Raises:
        ValueError: if two rewards have one name.
        RewardError: if an extra reward fails; it names the reward and the record.
        JudgeError: if the judge cannot be used at all.
    """
    own = extra_terms(questions, extra)
    graded = grade_questions(questions, judge) if judge is not None else [None] * len(questions)
    return [
        _sums(question, weights, extra, terms, grades)
        for question, terms, grades in zip(questions, own, graded, strict=True)
    ]


def _sums(
    question: AnsweredQuestion,
    weights: RewardWeights,
    extra: Sequence[ExtraReward],
    own: Mapping[str, FloatArray],
    grades: Grades | None,
) -> GroupRewards:
    record = question.record
    terms = {
        "format": _array([format_reward(o) for o in question.localizations]),
        "iou": _array([iou_reward(o, record) for o in question.localizations]),
        "accuracy": _array([accuracy(o, record) for o in question.localizations]),
        "sparse_format": _array([[format_reward(o) for o in row] for row in question.reasonings]),
        "sparse_accuracy": _array([[accuracy(o, record) for o in row] for row in question.reasonings]),
    }
    if grades is not None:
        terms |= {"accuracy": grades.localization, "sparse_accuracy": grades.reasoning}
    if taken := [name for name in own if name in terms]:
        raise ValueError(f"two rewards are called {taken[0]!r}; give the extra reward another name")
    known = {name: np.nan_to_num(values) for name, values in (terms | dict(own)).items()}  # NaN: abstained
    # (G, 1) against (G, K): O_i is rewarded K times, once with each partner.
    dense = {name: known[name][:, None] for name in ("format", "iou", "accuracy")}
    localization = (  # (G, K)
        weights.format * dense["format"]
        + weights.iou * dense["iou"]
        + weights.accuracy * dense["accuracy"]
        + weights.feedback * known["sparse_accuracy"]
    )
    reasoning = (  # (G, K)
        weights.format * known["sparse_format"]
        + weights.accuracy * known["sparse_accuracy"]
        + weights.feedback * dense["accuracy"]
    )
    for reward in extra:
        if reward.branch in ("localization", "both"):
            localization = localization + reward.weight * known[reward.name][:, None]
        if reward.branch in ("reasoning", "both"):
            reasoning = reasoning + reward.weight * known[f"sparse_{reward.name}"]
    asked, missing = (None, 0) if grades is None else (grades.asked, grades.missing)
    return GroupRewards(localization, reasoning, terms | dict(own), asked, missing)


def _array(values: Sequence[float | None] | Sequence[Sequence[float | None]]) -> FloatArray:
    """The values as float64, None as NaN."""
    return np.array(values, dtype=np.float64)
