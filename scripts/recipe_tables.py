"""Write the doctor's table into the heads of recipes: `python scripts/recipe_tables.py`.

A recipe has a table if its head holds the line `MARK`; the lines below name devices, such as `#   8 x H200 141GB`, and
get the figures of `vitos doctor --recipe`. `tests/doctor/test_recipe_tables.py` compares the files with what this
script would write.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vitos.config.recipe import load_recipe
from vitos.doctor.devices import GIB, find_device
from vitos.doctor.recipe import diagnose_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
MARK = "# Estimated by `vitos doctor --recipe` (docs/hours.md), not measured; written by scripts/recipe_tables.py:"
COLUMNS = f"#   {'devices':<22}{'GiB sampling':>14}{'GiB update':>12}{'GiB usable':>12}{'hours':>8}"
_ROW = re.compile(r"#   (\d+) x (\S.*?)(?:  .*)?")


def with_table(text: str, path: Path) -> str:
    """A recipe's text with its table made anew; without the mark, the text as it is."""
    lines = text.split("\n")
    if MARK not in lines:
        return text
    start = lines.index(MARK) + 1
    rows = [line for line in lines[start : start + 10] if _ROW.fullmatch(line)]
    end = start + len(rows) + (lines[start].startswith("#   devices"))
    return "\n".join([*lines[:start], COLUMNS, *(_figures(row, path) for row in rows), *lines[end:]])


def _figures(row: str, path: Path) -> str:
    """A line of the table."""
    match = _ROW.fullmatch(row)
    if match is None:
        raise ValueError(f"{path}: {row!r} is not `#   NUMBER x DEVICE`")
    count, device = int(match[1]), find_device(match[2].strip())
    found = diagnose_recipe(load_recipe(path), count, device)
    peaks = [sum(parts.values()) / GIB for parts in (found.memory.sampling, found.memory.update)]
    usable = found.usable / GIB
    hours = f"{found.hours:.1f}" if found.fits else "no room"
    return f"#   {f'{count} x {device.name}':<22}{peaks[0]:>14.1f}{peaks[1]:>12.1f}{usable:>12.1f}{hours:>8}"


def main() -> int:
    for path in sorted(RECIPES.glob("*.yaml")):
        before = path.read_text(encoding="utf-8")
        after = with_table(before, path)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.name}: table written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
