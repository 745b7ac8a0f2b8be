"""Prepare a release: version, changelog, wheel and sdist, checked by twine. Nothing is committed, tagged or uploaded.

    python scripts/release.py 0.2.0

Needs `build` and `twine`.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION_FILES = {
    "pyproject.toml": r'(?m)^version = "[^"]*"$',
    "src/vitos/core/version.py": r'(?m)^__version__ = "[^"]*"$',
    "CITATION.cff": r"(?m)^version: .*$",
}


def set_version(root: Path, version: str, date: str) -> None:
    """Write the version everywhere, and turn the changelog's "Unreleased" into it, below a new empty one.

    Raises:
        ValueError: if the version is not X.Y.Z, is in the changelog already, or a file has no place for it.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise ValueError(f"{version!r} is not a version such as 0.2.0 or 0.2.0rc1")
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    if f"## [{version}]" in text:
        raise ValueError(f"CHANGELOG.md: {version} is released already")
    if text.count("## [Unreleased]\n") != 1:
        raise ValueError("CHANGELOG.md: there must be one heading '## [Unreleased]'")
    changed = {changelog: text.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{version}] – {date}\n")}
    for name, pattern in VERSION_FILES.items():
        file = root / name
        found = re.findall(pattern, old := file.read_text(encoding="utf-8"))
        if not found:
            raise ValueError(f"{name}: no line for the version ({pattern})")
        changed[file] = re.sub(pattern, lambda line: _line(line[0], version), old, count=1)
    for file, new in changed.items():
        file.write_text(new, encoding="utf-8")


def _line(line: str, version: str) -> str:
    """The same line with another version; quotes stay."""
    return re.sub(r'(?<=[=:] )"?[^"\s]+"?$', f'"{version}"' if '"' in line else version, line)


def main() -> None:
    """Refuse a tree with changes, set the version, build, check."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/release.py VERSION")
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if status.stdout:
        sys.exit(f"there are changes that are not committed:\n{status.stdout}")
    if (ROOT / "dist").exists():
        sys.exit("dist exists; remove it, so that only this version is in it")
    set_version(ROOT, sys.argv[1], datetime.date.today().isoformat())
    subprocess.run([sys.executable, "-m", "build"], cwd=ROOT, check=True)
    built = sorted((ROOT / "dist").iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], cwd=ROOT, check=True)
    print("Read git diff, commit, tag, and upload:", *built, sep="\n  ")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
