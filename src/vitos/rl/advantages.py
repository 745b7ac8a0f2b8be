"""From the rewards of a group to advantages (algorithm.md §7): pure NumPy.

Axes: P questions, G localizations of each, K reasonings of each localization.
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

    `evidence` takes out what the boxes decided and leaves what the reasoning did with them; λ·acc(O_i) is constant
    there and cancels. It is for the reasoning branch only: localization rollouts have nothing to compare within it.

    Args:
        rewards: shape (P, G, K).
        scale: divide by the standard deviation (population).
        std_floor: ε; also the least divisor's order of magnitude. Without `scale` it is not used.

    Returns:
        Shape (P, G, K), zero mean within each group.
    """
    axes = (1, 2) if group == "pair" else (2,)
    centred: FloatArray = rewards - rewards.mean(axis=axes, keepdims=True)
    if not scale:
        return centred
    advantages: FloatArray = centred / (rewards.std(axis=axes, keepdims=True) + std_floor)
    return advantages


def informative(*outcomes: FloatArray, group: AdvantageGroup = "pair") -> NDArray[np.bool_]:
    """Pairs whose group differs in at least one outcome, shape (P, G, K).

    Where all answers of a group are right or all are wrong, what is left to tell its rollouts apart is their format,
    and dividing that by a tiny standard deviation makes phantom advantages (field_notes P22).

    Args:
        outcomes: each of shape (P, G, K), such as the accuracy; for localization also the IoU, which is an outcome of
            its own: boxes can be better or worse where the answer is right either way. NaN (abstained) is equal to
            itself.
    """
    axes = (1, 2) if group == "pair" else (2,)
    differs = np.zeros(outcomes[0].shape, dtype=bool)
    for outcome in outcomes:
        values = np.nan_to_num(outcome)
        differs |= np.ptp(values, axis=axes, keepdims=True) > 1e-9
    return differs


def split_signs(advantages: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(A⁺_i, A⁻_i) = (Σ_j max(A_ij, 0), Σ_j min(A_ij, 0)), each of shape (P, G).

    O_i stands K times in the localization loss. One forward pass weighted by both sums equals the literal repeat.
    """
    return np.maximum(advantages, 0).sum(-1), np.minimum(advantages, 0).sum(-1)
