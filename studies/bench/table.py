"""Means over seeds of a `rows.csv` of `vitos bench run`: `python studies/bench/table.py studies/bench/phantom.csv`.

Of several benchmarks, the questions of all; name one behind the file for its own.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean


def main(path: Path, benchmark: str | None = None) -> None:
    """Print selectors over budgets: accuracy in per cent, mean of the models (lowest to highest)."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    named = {row["benchmark"] for row in rows}
    wanted = benchmark or ("all" if "all" in named else min(named))
    for row in rows:
        if row["benchmark"] == wanted:
            cells[row["selector"]][row["budget"]].append(100 * float(row["accuracy"]))
    budgets = list(dict.fromkeys(budget for own in cells.values() for budget in own))
    print("| tokens | " + " | ".join(budgets) + " |")
    print("| :-- |" + " --: |" * len(budgets))
    for selector, own in cells.items():
        shown = (f"{mean(own[b]):.1f} ({min(own[b]):.1f} to {max(own[b]):.1f})" if b in own else "–" for b in budgets)
        print(f"| {selector} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
