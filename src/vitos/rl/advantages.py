"""From the rewards of a group to advantages (docs/method.md, section 8): pure NumPy.

Axes: P questions, G localizations per question, K reasonings per localization.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
AdvantageGroup = Literal["pair", "evidence"]


def group_advantages(
    rewards: FloatArray, *, group: AdvantageGroup = "pair", scale: bool = True, std_floor: float = 1e-4
) -> FloatArray:
    """A = (r − mean) / (std + ε), over all G×K pairs of a question or over the K pairs of one localization.

    >>> group_advantages(np.array([[[1.0, 0.0], [0.0, 0.0]]]), scale=False).tolist()
    [[[0.75, -0.25], [-0.25, -0.25]]]

    The group "evidence" removes the effect of the boxes and leaves the effect of the reasoning; λ·acc(O_i) is constant
    in it and cancels. It is for the reasoning branch only: it contains a single localization, with nothing to compare.

    Args:
        rewards: rewards of all pairs, shape (P, G, K).
        group: the pairs that share a mean, "pair" for all of a question, "evidence" for those of one localization.
        scale: whether to divide by the (population) standard deviation.
        std_floor: ε, added to the standard deviation; not used without `scale`.

    Returns:
        Advantages, shape (P, G, K), zero mean within each group.
    """
    axes = (1, 2) if group == "pair" else (2,)
    centred: FloatArray = rewards - rewards.mean(axis=axes, keepdims=True)
    if not scale:
        return centred
    advantages: FloatArray = centred / (rewards.std(axis=axes, keepdims=True) + std_floor)
    return advantages


def informative(*outcomes: FloatArray, group: AdvantageGroup = "pair") -> NDArray[np.bool_]:
    """True at pairs whose group differs in at least one outcome, shape (P, G, K).

    If all answers of a group are right or all are wrong, its rollouts differ in their format at most, and dividing
    that by a tiny standard deviation would make large advantages out of nothing.

    Args:
        outcomes: arrays of shape (P, G, K), such as the accuracy. For localization the IoU is another outcome, since
            boxes can be better or worse when the answer is right either way. NaN (abstained) equals itself.
        group: the pairs that are compared, as in `group_advantages`.
    """
    axes = (1, 2) if group == "pair" else (2,)
    differs = np.zeros(outcomes[0].shape, dtype=bool)
    for outcome in outcomes:
        values = np.nan_to_num(outcome)
        differs |= np.ptp(values, axis=axes, keepdims=True) > 1e-9
    return differs


def split_signs(advantages: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(A⁺_i, A⁻_i) = (Σ_j max(A_ij, 0), Σ_j min(A_ij, 0)), each of shape (P, G).

    O_i occurs K times in the localization loss. One forward pass weighted by both sums equals the literal repeat.
    """
    return np.maximum(advantages, 0).sum(-1), np.minimum(advantages, 0).sum(-1)
