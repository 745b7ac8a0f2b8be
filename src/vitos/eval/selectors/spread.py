"""Greedy orders of points: each next one is farthest from those before it, or spans the largest volume with them.

Plain NumPy on small matrices. A smaller choice is always the beginning of a larger one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitos.core.geometry import BoolArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# A vector of which less than this share is new counts as spanned by those before it.
_SPANNED = 1e-9


def max_min_order(distance: FloatArray, first: int | None = None, last: BoolArray | None = None) -> IntArray:
    """All points in the greedy order of the max-min diversity problem, shape (n,).

    Each next point has the largest distance to its nearest predecessor; of equal points the first.

    Args:
        distance: symmetric, shape (n, n).
        first: index of the first point; None: the point whose nearest neighbour is farthest.
        last: bool, shape (n,), True for points that come only when no other is left.
    """
    n = len(distance)
    if first is None:
        first = int(np.argmax((distance + np.diag(np.full(n, np.inf))).min(axis=1))) if n > 1 else 0
    penalty = np.zeros(n) if last is None else np.where(last, -1e9, 0.0)
    order, taken = np.empty(n, dtype=np.int64), np.zeros(n, dtype=bool)
    order[0], taken[first] = first, True
    nearest = distance[first].copy()
    for step in range(1, n):
        chosen = int(np.argmax(np.where(taken, -np.inf, nearest + penalty)))
        order[step], taken[chosen] = chosen, True
        nearest = np.minimum(nearest, distance[chosen])
    return order


def determinant_order(kernel: FloatArray, count: int | None = None) -> IntArray:
    """Greedy maximum of det(kernel[S, S]): each next item makes the determinant largest; shape (count,).

    Chen et al. 2018 (arXiv 1709.05135): with V the Cholesky rows of the items so far, d_i² = L_ii − Σ_j V_ji² is the
    factor by which item i would multiply the determinant. When no item adds volume any more (more items than
    dimensions), the rest follows by L_ii.

    Args:
        kernel: symmetric, positive semidefinite, shape (n, n).
        count: number of items wanted; None: all.
    """
    n = len(kernel)
    count = n if count is None else count
    own = np.diag(kernel).copy()
    gain, rows = own.copy(), np.empty((count, n))
    taken = np.zeros(n, dtype=bool)
    order: list[int] = []
    floor = _SPANNED * max(float(own.max()), np.finfo(float).tiny)
    while len(order) < count:
        chosen = int(np.argmax(np.where(taken, -np.inf, gain)))
        if gain[chosen] <= floor:
            rest = np.argsort(np.where(taken, np.inf, -own), kind="stable")[: count - len(order)]
            order.extend(rest.tolist())
            break
        step = len(order)
        row = (kernel[chosen] - rows[:step, chosen] @ rows[:step]) / np.sqrt(gain[chosen])
        rows[step] = row
        gain = gain - row**2
        order.append(chosen)
        taken[chosen] = True
    return np.array(order, dtype=np.int64)
