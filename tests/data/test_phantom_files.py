"""Splits of phantoms that are there already: kept, or replaced whole."""

import json

import pytest
from PIL import Image

from vitos.data import phantom
from vitos.data.phantom import write_phantoms
from vitos.data.phantom_files import PhantomSettings, read_settings, refuse_others
from vitos.data.readers import read_records


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder):
    return sorted(path.name for path in (folder / "images").iterdir())


@pytest.mark.parametrize(("count", "seed", "size"), [(3, 0, 64), (5, 7, 64), (2, 0, 32)])
def test_settings_are_read_back(tmp_path, count, seed, size):
    path = write_phantoms(tmp_path, "val", count, seed, size)
    assert read_settings(path) == PhantomSettings(count, seed, size)


@pytest.mark.parametrize("other", [{"count": 2}, {"count": 5}, {"seed": 1}, {"size": 32}])
def test_other_settings_are_refused_by_name_and_replace_the_whole_when_told(tmp_path, other):
    settings = {"count": 3, "seed": 0, "size": 64}
    write_phantoms(tmp_path, "train", **settings)
    write_phantoms(tmp_path, "val", 2, size=64)
    before = listing(tmp_path)
    wanted = settings | other
    text = rf"train.json holds 3 questions of seed 0 at 64 pixels, not {PhantomSettings(**wanted)}; .*--overwrite"
    with pytest.raises(FileExistsError, match=text):
        write_phantoms(tmp_path, "train", **wanted)
    assert listing(tmp_path) == before
    write_phantoms(tmp_path, "train", **wanted, overwrite=True)
    (fresh := tmp_path / "fresh").mkdir()
    write_phantoms(fresh, "train", **wanted)
    expected = listing(fresh) | {name: data for name, data in before.items() if "val" in name}
    assert {name: data for name, data in listing(tmp_path).items() if "fresh" not in name} == expected


def test_the_same_settings_give_the_same_files(tmp_path):
    write_phantoms(tmp_path, "train", 4, size=32)
    before = listing(tmp_path)
    for lost in ([2], [0, 1], [0, 1, 2, 3]):  # they come back
        for number in lost:
            (tmp_path / "images" / f"train_0_{number}.png").unlink()
        write_phantoms(tmp_path, "train", 4, size=32)
        assert listing(tmp_path) == before


def change_answer(rows):
    rows[1]["answer"] = "A" if rows[1]["answer"] != "A" else "B"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_answer, "was changed since it was made"),
        (lambda rows: rows[0].update(id="mine"), "was not made by vitos data phantom"),
        (lambda rows: rows.insert(0, {"question": "?"}), "was not made by"),
        (lambda rows: rows.clear(), "was not made by"),
    ],
)
def test_what_a_user_has_changed_is_not_replaced_unasked(tmp_path, change, message):
    path = write_phantoms(tmp_path, "train", 3, size=32)
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        write_phantoms(tmp_path, "train", 3, size=32)
    assert listing(tmp_path) == before
    write_phantoms(tmp_path, "train", 3, size=32, overwrite=True)
    assert len(read_records(tmp_path, split="train")) == 3


@pytest.mark.parametrize("content", ["[", "{}", "7"])
def test_a_file_of_another_kind_is_not_replaced_unasked(tmp_path, content):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(FileExistsError, match="was not made by"):
        write_phantoms(tmp_path, "train", 3, size=32)


def test_all_splits_are_named_at_once(tmp_path):
    for split in ("train", "val", "test"):
        write_phantoms(tmp_path, split, 2, size=32)
    wanted = {"train": PhantomSettings(2, 0, 32), "val": PhantomSettings(3, 0, 32), "test": PhantomSettings(4, 0, 32)}
    with pytest.raises(FileExistsError) as caught:
        refuse_others(tmp_path, wanted)
    assert "val.json holds 2" in str(caught.value)
    assert "test.json holds 2" in str(caught.value)
    assert "train.json" not in str(caught.value)


def test_images_of_a_stopped_writing_are_removed(tmp_path, monkeypatch):
    def stop(scene, size):
        if len(images(tmp_path)) == 3:
            raise KeyboardInterrupt
        return Image.new("RGB", (size, size))

    with monkeypatch.context() as patched:
        patched.setattr(phantom, "render", stop)
        with pytest.raises(KeyboardInterrupt):
            write_phantoms(tmp_path, "train", 5, seed=9, size=32)
    assert not (tmp_path / "train.json").exists()
    assert len(images(tmp_path)) == 3
    write_phantoms(tmp_path, "train", 2, size=32)
    assert images(tmp_path) == ["train_0_0.png", "train_0_1.png"]


def test_only_images_that_belong_to_nothing_are_removed(tmp_path):
    """Not another split's, not a user's own, not those that another record file names."""
    write_phantoms(tmp_path, "train", 4, size=32)
    write_phantoms(tmp_path, "val", 2, size=32)
    rows = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "subset.jsonl").write_text("\n".join(json.dumps(row | {"id": "x"}) for row in rows[3:]))
    for name in ("train_mine.png", "train_0_9.jpg", "mytrain_0_3.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    write_phantoms(tmp_path, "train", 2, size=32, overwrite=True)
    of_train = ["train_0_0.png", "train_0_1.png", "train_0_3.png", "train_0_9.jpg", "train_mine.png"]
    assert images(tmp_path) == ["mytrain_0_3.png", *of_train, "val_0_0.png", "val_0_1.png"]
    read_records(tmp_path / "subset.jsonl")
