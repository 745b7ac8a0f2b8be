"""`vitos data check` of recipes and several files, and `vitos data phantom` where phantoms are already."""

import json
import shutil

import pytest

from vitos.cli.main import main
from vitos.cli.screen import console
from vitos.data.phantom import write_phantoms


def vitos(capsys, monkeypatch, *args):
    """Exit code, standard output and standard error of one call, without the line breaks of tables."""
    monkeypatch.setattr("sys.argv", ["vitos", *map(str, args)])
    monkeypatch.setattr(console, "width", 400)
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Phantoms, of which the test split has two images and questions of the train split."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_phantoms(tmp_path / "data", split, 5)
    rows = json.loads((tmp_path / "data/test.json").read_text())
    extra = json.loads((tmp_path / "data/train.json").read_text())[:2]
    for number, row in enumerate(extra):
        shutil.copy(tmp_path / "data" / row["image_path"][0], tmp_path / f"data/images/copy{number}.png")
        row |= {"id": f"copy/{number}", "image_path": [f"images/copy{number}.png"]}
    (tmp_path / "data/leaky.json").write_text(json.dumps(rows + extra))
    (tmp_path / "recipe.yaml").write_text(
        "{name: x, output_dir: out, data: {train: data/train.json, eval: [data/test.json, data/leaky.json]}}"
    )
    return tmp_path


def test_files_of_one_call_are_compared(folder, capsys, monkeypatch):
    code, out, error = vitos(capsys, monkeypatch, "data", "check", "data/train.json", "data/leaky.json")
    assert code == 0, error
    assert "2 image(s) of leaky.json are also in train.json: copy0.png (leaky.json[5]) and train_0_0.png" in out
    assert out.count("is the question of train.json[") == 2
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", "data/train.json", "data/leaky.json", "--strict")
    assert code == 1
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", "data/train.json", "data/test.json", "--strict")
    assert code == 0
    assert out.count("No problems found") == 2


def test_train_and_eval_of_a_recipe_are_compared(folder, capsys, monkeypatch):
    """Two evaluation sets may share their images, training and evaluation may not."""
    code, out, error = vitos(capsys, monkeypatch, "data", "check", "recipe.yaml", "--strict")
    assert code == 1, error
    assert "2 image(s) of eval are also in train" in out
    assert out.count("image(s) of eval are also") == 1
    assert all(f"data/{name}.json" in out for name in ("train", "test", "leaky"))
    code, _, error = vitos(capsys, monkeypatch, "data", "check", "recipe.yaml", "data/test.json")
    assert code == 1
    assert "give one recipe alone" in error
    (folder / "recipe.yaml").write_text("{name: x, output_dir: out, data: {train: data/none.json}}")
    code, _, error = vitos(capsys, monkeypatch, "data", "check", "recipe.yaml")
    assert code == 1
    assert "data/none.json: no such file" in error


def test_a_file_that_is_given_twice_is_checked_once(folder, capsys, monkeypatch):
    code, out, _ = vitos(capsys, monkeypatch, "data", "check", "data/test.json", "data/test.json", "--strict")
    assert code == 0
    assert out.count("No problems found") == 1


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_phantoms_are_not_replaced_unasked(tmp_path, capsys, monkeypatch):
    """As the README shows it after the quickstart: another number of test questions, and nothing is touched."""
    args = ["data", "phantom", tmp_path, "--train", 3, "--val", 2]
    code, _, error = vitos(capsys, monkeypatch, *args, "--test", 5)
    assert code == 0, error
    before = listing(tmp_path)
    code, _, error = vitos(capsys, monkeypatch, *args, "--test", 4)
    assert code == 1
    assert f"{tmp_path / 'test.json'} holds 5 questions of seed 0 at 128 pixels, not 4 questions" in error
    assert "--overwrite" in error
    assert listing(tmp_path) == before
    code, _, error = vitos(capsys, monkeypatch, *args, "--test", 5)
    assert code == 0, error
    assert listing(tmp_path) == before
    code, _, error = vitos(capsys, monkeypatch, *args, "--test", 4, "--overwrite")
    assert code == 0, error
    assert set(before) - set(listing(tmp_path)) == {"test_0_4.png"}
    assert len(json.loads((tmp_path / "test.json").read_text())) == 4


def test_no_questions_leave_a_split_as_it_is(tmp_path, capsys, monkeypatch):
    vitos(capsys, monkeypatch, "data", "phantom", tmp_path, "--train", 3, "--val", 2, "--test", 2)
    before = listing(tmp_path)
    args = ["--train", 0, "--val", 4, "--test", 0, "--overwrite"]
    code, _, error = vitos(capsys, monkeypatch, "data", "phantom", tmp_path, *args)
    assert code == 0, error
    after = listing(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("val")} == {
        name: data for name, data in before.items() if not name.startswith("val")
    }
    assert len(after) == len(before) + 2
