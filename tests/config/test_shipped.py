"""Recipes by name: from any folder, in a package and in a checkout, and what a wrong name is told."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitos.config import shipped
from vitos.config.recipe import ConfigError, load_recipe
from vitos.config.shipped import find_recipe, launch_names, origin_of, recipe_names, shipped_file

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem)
PHANTOM = "vitos data phantom runs/phantom --train 2000 --val 256 --test 800 --seed 0"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A current folder without recipes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_the_files_of_the_repository():
    assert recipe_names() == [path.stem for path in RECIPES]
    assert launch_names() == ["accelerate/1gpu", "accelerate/2gpu", "accelerate/2nodes", "accelerate/8gpu"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_name_gives_the_recipe_of_that_file(path):
    assert load_recipe(path.stem) == load_recipe(path)
    assert load_recipe(path.stem, ["seed=5"]).seed == 5
    assert find_recipe(path.stem).read_bytes() == path.read_bytes()


def test_the_package_s_own_folder_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/vitos"
    package.mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/checkout.yaml").write_text("name: checkout\n")
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert recipe_names() == ["checkout"]
    shutil.copytree(ROOT / "recipes", package / "recipes")
    assert recipe_names() == [path.stem for path in RECIPES]
    assert shipped_file("real").is_relative_to(package)


def test_a_file_of_that_path_comes_before_the_shipped_recipe(elsewhere):
    text = "name: mine\noutput_dir: runs/mine\ndata: {train: a.json}\n"
    (elsewhere / "quickstart").write_text(text)
    assert load_recipe("quickstart").name == load_recipe(Path("quickstart")).name == "mine"
    (elsewhere / "quickstart").unlink()
    (elsewhere / "quickstart").mkdir()
    assert load_recipe("quickstart").name == "quickstart"  # a folder is no recipe


@pytest.mark.parametrize(
    "typed", ["quikstart", "Quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "./quickstrt"]
)
def test_a_near_miss_is_told_the_name(typed):
    with pytest.raises(ConfigError, match="did you mean quickstart, which comes with vitos") as caught:
        load_recipe(typed)
    assert str(caught.value).startswith(f"{typed}: ")


@pytest.mark.parametrize("typed", ["my-own-experiment.yaml", "zz", "a/b/c"])
def test_any_other_name_is_told_what_there_is(typed):
    with pytest.raises(ConfigError, match=r"there is no such file; .* comes with vitos: .*lingshu-7b, .*quickstart"):
        load_recipe(typed)


@pytest.mark.parametrize("folder", [".", "", "runs"])
def test_a_folder_is_no_recipe(elsewhere, folder):
    (elsewhere / "runs").mkdir()
    with pytest.raises(ConfigError, match="this is a folder"):
        load_recipe(folder)


@pytest.mark.parametrize("name", ["accelerate/8gpu", "8gpu"])
def test_launch_configurations_are_files_but_no_recipes(name):
    assert "num_processes: 8" in shipped_file("accelerate/8gpu").read_text()
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["../pyproject", "/etc/passwd", "", ".", "accelerate", "accelerate/../real"])
def test_only_what_is_listed_can_be_shown(name):
    with pytest.raises(FileNotFoundError, match="no recipe is called"):
        shipped_file(name)


def test_an_installation_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "a/b/vitos")
    assert recipe_names() == launch_names() == []
    with pytest.raises(ConfigError, match="holds no recipes, so reinstall vitos"):
        load_recipe("quickstart")


@pytest.mark.parametrize("source", ["runs/phantom/train.json", "./runs/phantom/test.json"])
def test_phantoms_that_are_missing_come_with_their_command(source):
    assert origin_of(source).splitlines()[1:] == [f"  {PHANTOM}"]


def test_the_command_is_the_one_of_the_makefile():
    assert PHANTOM.removeprefix("vitos ") in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_record_file_of_a_recipe_has_an_origin_and_no_other():
    for path in RECIPES:
        recipe = load_recipe(path)
        assert all(map(origin_of, (*recipe.data.train, *recipe.data.eval)))
    assert "vitos recipes show " in origin_of("data/vitar-16k/train.json")
    assert origin_of("my-data/train.json") == origin_of("hub:owner/name") == ""


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys; from vitos.config.shipped import recipe_names; assert recipe_names();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'scipy', 'PIL', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
