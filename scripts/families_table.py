"""Run the invariants of every family and write docs/families.md: `python scripts/families_table.py`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
HEADER = """# Families and invariants

Written by `python scripts/families_table.py` from a run of `tests/backbones/test_invariants.py`, on a CPU in float64
with small random models of the true architectures, against transformers {transformers} and PyTorch {torch}. A cell is
the number of its cases that passed; a dash means that the invariant says nothing about the family.

"""


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.backbones.families import FAMILIES

    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "tests/backbones/test_invariants.py", f"--junitxml={report}", *sys.argv[1:]]
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    names = [family.name for family in FAMILIES]
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for case in cases:
        test, _, parameters = case.attrib["name"].partition("[")
        # The longest name first: one family's name may begin another's.
        found = [name for name in sorted(names, key=len, reverse=True) if parameters.startswith(name)]
        if found:
            children = {child.tag for child in case}
            state = "skipped" if "skipped" in children else "failed" if children & {"failure", "error"} else "passed"
            counts[test][found[0]][state] += 1
    lines = ["| invariant | " + " | ".join(names) + " |", "| :-- |" + " :-: |" * len(names)]
    for test, row in counts.items():
        cells = " | ".join(_cell(row[name]) for name in names)
        lines.append(f"| {test.removeprefix('test_').replace('_', ' ')} | {cells} |")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    text = HEADER.format(**versions) + "\n".join(lines) + "\n"
    (ROOT / "docs" / "families.md").write_text(text, encoding="utf-8")
    return code


def _cell(count: Counter[str]) -> str:
    if count["failed"]:
        return f"**{count['failed']} failed**, {count['passed']} passed"
    return str(count["passed"]) if count["passed"] else "–"


if __name__ == "__main__":
    sys.exit(main())
