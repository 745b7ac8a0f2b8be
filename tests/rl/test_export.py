"""The exported conversations, read by another library, hold the records' pictures, boxes and answers."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.core.geometry import Box
from vitos.core.record import Record
from vitos.core.response import parse_localization, parse_reasoning
from vitos.data.images import load_image
from vitos.policy.spec import VitosSpec
from vitos.policy.vlm import SparseVLM
from vitos.rl.export import FORMATS, export_chat
from vitos.rl.lessons import record_lesson


def conversations(folder, form):
    """Rows as `datasets`, which both programs read files with, gives them."""
    from datasets import load_dataset

    name = {"llamafactory": "vitos.json", "ms-swift": "vitos.jsonl"}[form]
    return load_dataset("json", data_files=str(folder / name), cache_dir=str(folder / ".cache"))["train"].to_list()


@pytest.mark.parametrize("style", ["normalized", "absolute", "per_mille"])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_conversations_are_the_targets_of_the_records(form, style, nano, phantom_records, tmp_path):
    policy = SparseVLM(nano, VitosSpec(coordinates=style))
    records = phantom_records[:3]
    assert export_chat(policy, records, tmp_path / "out", form) == 6
    rows = conversations(tmp_path / "out", form)
    assert len(rows) == 6
    for record, first, second in zip(records, rows[::2], rows[1::2], strict=True):
        picture = load_image(record.image_paths[0])
        lesson = record_lesson(record, [picture], nano, policy.spec)
        for row, exercise in zip((first, second), lesson.exercises, strict=True):
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
            assert [m["content"] for m in row["messages"]] == [exercise.text, exercise.target]
            assert row["messages"][0]["content"].count("<image>") == len(row["images"]) == 1
            with Image.open(tmp_path / "out" / row["images"][0]) as written:
                assert written.mode == "RGB"
                assert written.tobytes() == picture.tobytes()
        (visual,) = nano.encode([picture])
        read = parse_localization(first["messages"][1]["content"], record.options, nano.box_reader(visual, style))
        assert read.answer == record.answer
        for found, gold in zip(read.boxes, record.boxes, strict=True):
            assert all(abs(a - b) < 0.02 for a, b in zip(found.as_tuple(), gold.as_tuple(), strict=True))
        assert parse_reasoning(second["messages"][1]["content"], record.options).answer == record.answer


def test_llamafactory_finds_the_data_set(nano, phantom_records, tmp_path):
    export_chat(SparseVLM(nano, VitosSpec()), phantom_records[:1], tmp_path / "out", "llamafactory")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["vitos"]
    assert (tmp_path / "out" / info["file_name"]).is_file()
    assert info["formatting"] == "sharegpt"
    row = json.loads((tmp_path / "out" / info["file_name"]).read_text())[0]
    assert set(info["columns"].values()) == set(row)
    tags = info["tags"]
    assert [m[tags["role_tag"]] for m in row["messages"]] == [tags["user_tag"], tags["assistant_tag"]]
    assert all(m[tags["content_tag"]] for m in row["messages"])


def test_a_crop_is_written_as_it_is_seen_and_boxes_refer_to_it(nano, picture, tmp_path):
    """In the picture that the other program opens, the box must be where the finding is."""
    picture(200, 100).save(tmp_path / "a.png")
    path = tmp_path / "a.png#crop=0.5,0,1,1"
    record = Record("1", (path,), "<image>What is it?\nA. cyst\nB. mass", "B", (Box(0.5, 0.0, 0.75, 1.0),))
    export_chat(SparseVLM(nano, VitosSpec(coordinates="normalized")), [record, record], tmp_path / "out", "ms-swift")
    first, _, third, _ = conversations(tmp_path / "out", "ms-swift")
    assert "[[0.00, 0.00, 0.50, 1.00]]" in first["messages"][1]["content"]
    assert first["images"] == third["images"] == ["images/000000.png"]
    assert Image.open(tmp_path / "out" / "images/000000.png").size == (100, 100)


def test_what_cannot_be_exported_is_refused(nano, phantom_records, picture, tmp_path):
    policy = SparseVLM(nano, VitosSpec())
    with pytest.raises(ValueError, match="'alpaca' is not a format; choose one of llamafactory, ms-swift"):
        export_chat(policy, phantom_records, tmp_path / "out", "alpaca")
    picture(40, 40).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="odd: the question has 0 <image> for 1 images"):
        export_chat(policy, [Record("odd", (tmp_path / "a.png",), "What?", "A")], tmp_path / "out", "ms-swift")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        export_chat(policy, phantom_records[:1], tmp_path / "out", "ms-swift")


def test_the_verb(phantom_records, tmp_path):
    from vitos.data.phantom import write_phantoms

    data = str(write_phantoms(tmp_path / "data", "train", 2))
    done = CliRunner().invoke(
        app, ["data", "export", "nano", str(tmp_path / "out"), "--data", data, "--format", "ms-swift"]
    )
    assert done.exit_code == 0, done.output
    assert "4 conversations about 2 questions" in done.output
    assert len(conversations(tmp_path / "out", "ms-swift")) == 4
