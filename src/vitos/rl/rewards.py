"""Rewards of the two branches (docs/method.md, section 7): small pure functions, and their sums for one question.

For localization rollout `O_i` and its sparse rollouts `O'_ij`, i = 1..G, j = 1..K:

    r_ij  = w_f·format(O_i)   + w_iou·IoU(O_i) + w_a·acc(O_i)   + λ·acc(O'_ij)      localization branch
    r'_ij = w_f·format(O'_ij)                  + w_a·acc(O'_ij) + λ·acc(O_i)        reasoning branch

The λ terms are the cross-feedback: each branch is rewarded for its partner's accuracy. The terms and their places are
those of the paper; the weights are ours and come from the recipe.

To add a reward, write one function in a file and name it in the recipe as `file.py:function`:

    def short(response: Response, record: Record) -> float | None:   # None abstains
        return -len(response.text) / 1000
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vitos.config.recipe import RewardsSection
from vitos.core.answers import score_answer_text
from vitos.core.geometry import matched_iou
from vitos.core.record import Record
from vitos.core.response import Response

FloatArray = NDArray[np.float64]
RewardFunction = Callable[[Response, Record], float | None]
Branch = Literal["localization", "reasoning", "both"]


class RewardError(ValueError):
    """A user's reward could not be loaded, failed, or returned something that is not a finite number or None."""


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


@dataclass(frozen=True, slots=True)
class ExtraReward:
    """A user's reward: `weight` × `function(response, record)`, added to the rewards of `branch`.

    >>> def length(response, record):
    ...     return len(response.text) / 1000
    >>> penalty = ExtraReward("length", length, weight=-0.1, branch="reasoning")

    Attributes:
        name: name of the reward in the log.
        function: the reward of a response to a record; None abstains, and the term is left out of that sum.
        weight: weight of the reward; negative for a penalty.
        branch: the branch that gets the reward, "localization", "reasoning" or "both".

    Raises:
        ValueError: if the weight is not finite.
    """

    name: str
    function: RewardFunction
    _: KW_ONLY
    weight: float
    branch: Branch

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of reward {self.name!r} must be finite, got {self.weight}")


@dataclass(frozen=True, slots=True, eq=False)
class GroupRewards:
    """Rewards of the G×K pairs of one question.

    Attributes:
        localization: rewards r_ij of the localization branch, shape (G, K).
        reasoning: rewards r'_ij of the reasoning branch, shape (G, K).
        terms: the terms before weighting, for the log; NaN where a reward abstained. `format`, `iou` and `accuracy`
            have shape (G,), `sparse_format` and `sparse_accuracy` (G, K). An extra reward has its name and shape (G,)
            for localization, and its name prefixed with `sparse_` and shape (G, K) for reasoning.
    """

    localization: FloatArray
    reasoning: FloatArray
    terms: Mapping[str, FloatArray]


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
) -> GroupRewards:
    """Rewards of both branches for all rollouts of one question.

    Args:
        record: the question.
        localizations: responses O_i, length G.
        reasonings: responses O'_ij, G rows of length K; row i is conditioned on the boxes of O_i.
        weights: weights of the built-in terms.
        extra: a user's rewards, added to the sums of their branch.

    Raises:
        ValueError: if the rollouts are not G and G×K with G, K >= 1, or two rewards have one name.
        RewardError: if an extra reward fails; it names the reward and the record.
    """
    columns = {len(row) for row in reasonings}
    if not localizations or len(localizations) != len(reasonings) or len(columns) != 1 or 0 in columns:
        raise ValueError(
            f"record {record.id!r}: expected G localization rollouts and G rows of K >= 1 reasoning rollouts, got "
            f"{len(localizations)} and rows of {[len(row) for row in reasonings]}"
        )

    def per_localization(reward: Callable[[Response], float | None]) -> FloatArray:
        return _array([reward(o) for o in localizations])

    def per_reasoning(reward: Callable[[Response], float | None]) -> FloatArray:
        return _array([[reward(o) for o in row] for row in reasonings])

    terms = {
        "format": per_localization(format_reward),
        "iou": per_localization(lambda o: iou_reward(o, record)),
        "accuracy": per_localization(lambda o: accuracy(o, record)),
        "sparse_format": per_reasoning(format_reward),
        "sparse_accuracy": per_reasoning(lambda o: accuracy(o, record)),
    }
    # (G, 1) against (G, K): O_i is rewarded K times, once with each partner.
    dense = {name: terms[name][:, None] for name in ("format", "iou", "accuracy")}
    localization = (  # (G, K)
        weights.format * dense["format"]
        + weights.iou * np.nan_to_num(dense["iou"])  # NaN: abstained
        + weights.accuracy * dense["accuracy"]
        + weights.feedback * terms["sparse_accuracy"]
    )
    reasoning = (  # (G, K)
        weights.format * terms["sparse_format"]
        + weights.accuracy * terms["sparse_accuracy"]
        + weights.feedback * dense["accuracy"]
    )

    def log(name: str, values: FloatArray) -> FloatArray:
        if name in terms:
            raise ValueError(f"two rewards are called {name!r}; give the extra reward another name")
        terms[name] = values
        return np.nan_to_num(values)

    for reward in extra:
        call = _checked(reward, record)
        if reward.branch in ("localization", "both"):
            localization = localization + reward.weight * log(reward.name, per_localization(call))[:, None]
        if reward.branch in ("reasoning", "both"):
            reasoning = reasoning + reward.weight * log(f"sparse_{reward.name}", per_reasoning(call))
    return GroupRewards(localization, reasoning, terms)


def _checked(reward: ExtraReward, record: Record) -> Callable[[Response], float | None]:
    """`reward.function` for one record; errors name the reward and the record."""

    def call(response: Response) -> float | None:
        where = f"reward {reward.name!r}, record {record.id!r}"
        try:
            value = reward.function(response, record)
        except Exception as exc:
            raise RewardError(f"{where}: {type(exc).__name__}: {exc}") from exc
        return None if value is None else _finite(value, where)

    return call


def _finite(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an integer beyond the range of float
        number = math.inf
    if not math.isfinite(number):
        shown = number if isinstance(value, Real) else type(value).__name__
        raise RewardError(f"{where}: expected a finite number or None, got {shown}")
    return number


def _array(values: Sequence[float | None] | Sequence[Sequence[float | None]]) -> FloatArray:
    """The values as float64, None as NaN."""
    return np.array(values, dtype=np.float64)
