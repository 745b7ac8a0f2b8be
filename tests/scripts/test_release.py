"""The release script, on a copy of the files that it changes."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("release", ROOT / "scripts/release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


@pytest.fixture
def tree(tmp_path):
    for name in (*release.VERSION_FILES, "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_version_is_everywhere_and_nothing_else_changes(tree):
    release.set_version(tree, "9.8.7", "2030-01-02")
    for name in release.VERSION_FILES:
        old, new = ((root / name).read_text().splitlines() for root in (ROOT, tree))
        changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert len(changed) == 1
        assert re.sub(r"\d+\.\d+\.\d+", "9.8.7", changed[0][0]) == changed[0][1]
    text = (tree / "CHANGELOG.md").read_text()
    assert text.index("## [Unreleased]") < text.index("## [9.8.7] – 2030-01-02")
    assert text.replace("\n## [9.8.7] – 2030-01-02\n", "") == (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("version", ["1", "v1.2.3", "1.2.3 ", "1.2.3-x"])
def test_what_is_no_version_is_refused(tree, version):
    with pytest.raises(ValueError, match="is not a version"):
        release.set_version(tree, version, "2030-01-02")


def test_a_version_is_released_once(tree):
    release.set_version(tree, "9.8.7", "2030-01-02")
    with pytest.raises(ValueError, match="released already"):
        release.set_version(tree, "9.8.7", "2030-01-03")
