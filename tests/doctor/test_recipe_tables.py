"""The tables in the heads of recipes are what the doctor says today."""

from pathlib import Path

import pytest
from scripts.recipe_tables import MARK, RECIPES, with_table

PATHS = [path for path in sorted(RECIPES.glob("*.yaml")) if "nano" not in path.stem]
PATHS = [path for path in PATHS if "path: nano" not in path.read_text("utf-8")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_head_has_the_doctors_table(path):
    text = path.read_text(encoding="utf-8")
    assert MARK in text
    assert with_table(text, path) == text, "run: python scripts/recipe_tables.py"


def test_a_changed_recipe_changes_its_table(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = (RECIPES / "lingshu-7b-lora-48gb.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("localization_steps: 400", "localization_steps: 4000"), encoding="utf-8")
    (old, new) = (
        [line for line in written.split("\n") if "L40S" in line]
        for written in (text, with_table(path.read_text("utf-8"), path))
    )
    assert len(old) == len(new) == 1
    assert float(new[0].split()[-1]) > 4 * float(old[0].split()[-1])
    assert Path(RECIPES / "quickstart.yaml").read_text("utf-8") == with_table(
        (RECIPES / "quickstart.yaml").read_text("utf-8"), RECIPES / "quickstart.yaml"
    )
