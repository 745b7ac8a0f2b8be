"""What the scripts that make the small models print on their way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np


def reporter() -> Callable[..., None]:
    """A function of a part, a step and its figures: prints means over 50 steps, and the minutes so far."""
    start = time.time()
    seen: deque[tuple[float, ...]] = deque(maxlen=50)

    def report(part: str, step: int, *figures: float) -> None:
        if step == 1:
            seen.clear()
        seen.append(figures)
        if step % 50 == 0:
            means = "  ".join(f"{value:.3f}" for value in np.mean(seen, axis=0))
            print(f"{part} {step}  {means}  {(time.time() - start) / 60:.1f} min", flush=True)

    return report
