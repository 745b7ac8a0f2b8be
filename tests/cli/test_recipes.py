"""`vitos recipes`, and the verbs that take a recipe by name."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitos.cli.data import is_recipe
from vitos.cli.main import app, main
from vitos.config.recipe import load_recipe
from vitos.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vitos(*words):
    return CliRunner().invoke(app, list(words))


def error_of(capsys, monkeypatch, *words):
    """What a failing call prints as its error."""
    monkeypatch.setattr("sys.argv", ["vitos", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_the_list_names_every_recipe_with_its_model_and_purpose(monkeypatch):
    monkeypatch.setattr("vitos.cli.recipes.console.width", 250)
    result = vitos("recipes")
    assert result.exit_code == 0
    for path in RECIPES:
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"{path.stem} ")]
        assert line.split()[1] == load_recipe(path).model.path
        assert first in line
    assert "accelerate/8gpu" in result.output


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "recipes/accelerate/8gpu.yaml"], ids=lambda path: path.stem)
def test_show_prints_the_file_and_nothing_else(path):
    name = str(path.relative_to(ROOT / "recipes")).removesuffix(".yaml")
    result = vitos("recipes", "show", name)
    assert (result.exit_code, result.output) == (0, path.read_text(encoding="utf-8"))


def test_copy_makes_a_recipe_that_trains_alike(elsewhere):
    assert vitos("recipes", "copy", "quickstart").exit_code == 0
    assert vitos("recipes", "copy", "quickstart", "new/folder/mine.yaml").exit_code == 0
    assert vitos("recipes", "copy", "accelerate/8gpu", "new").exit_code == 0
    assert load_recipe("quickstart.yaml") == load_recipe("new/folder/mine.yaml") == load_recipe("quickstart")
    copied = [path.relative_to(elsewhere) for path in sorted(elsewhere.rglob("*.yaml"))]
    assert list(map(str, copied)) == ["new/8gpu.yaml", "new/folder/mine.yaml", "quickstart.yaml"]


@pytest.mark.parametrize("target", [(), ("quickstart.yaml",), (".",), ("link.yaml",)])
def test_copy_never_overwrites(elsewhere, capsys, monkeypatch, target):
    mine = elsewhere / "quickstart.yaml"
    mine.write_text("name: mine\n")
    (elsewhere / "link.yaml").symlink_to(elsewhere / "nowhere")
    error = error_of(capsys, monkeypatch, "recipes", "copy", "quickstart", *target)
    assert "exists; name another target" in error
    assert mine.read_text() == "name: mine\n"
    assert not (elsewhere / "nowhere").exists()


@pytest.mark.parametrize("verb", ["show", "copy"])
def test_a_typo_is_told_the_name(elsewhere, capsys, monkeypatch, verb):
    assert "did you mean lingshu-32b" in error_of(capsys, monkeypatch, "recipes", verb, "lingshu-32")
    assert list(elsewhere.iterdir()) == []


def test_dry_run_of_a_name_prints_the_recipe_s_values():
    result = vitos("train", "lingshu-7b", "--dry-run", "--set", f"output_dir={'long ' * 40}")
    assert result.exit_code == 0
    values = parse_yaml(result.stdout)
    assert values["output_dir"] == ("long " * 40).strip()  # not broken at the width of a screen
    assert values["train"]["num_reasonings"] == load_recipe("lingshu-7b").train.num_reasonings


def test_training_without_data_says_how_to_make_them(capsys, monkeypatch):
    expected = "vitos data phantom runs/phantom --train 2000 --val 256 --test 800 --seed 0"
    assert expected in error_of(capsys, monkeypatch, "train", "quickstart")
    assert expected in error_of(capsys, monkeypatch, "data", "cache", "quickstart", "--out", "cache")
    vitos("recipes", "copy", "quickstart", "mine.yaml")
    assert expected in error_of(capsys, monkeypatch, "train", "mine.yaml")


def test_data_of_one_s_own_that_are_missing_are_not_blamed_on_a_recipe(capsys, monkeypatch):
    error = error_of(capsys, monkeypatch, "train", "quickstart", "--set", "data.train=mine.json")
    assert "mine.json: no such file" in error
    assert "phantom" not in error


def test_doctor_takes_a_name():
    result = vitos("doctor", "--recipe", "quickstart", "--device", "80GB 989TFLOPS 3.35TB/s")
    assert result.exit_code == 0
    assert "quickstart: GiB on each" in result.stdout


def test_what_the_cache_takes_for_a_recipe(elsewhere):
    (elsewhere / "real").mkdir()
    assert is_recipe("quickstart")
    assert is_recipe("mine.yaml")
    assert not any(map(is_recipe, ("nano", "nano-real", "real", "owner/name")))  # models, and a folder
