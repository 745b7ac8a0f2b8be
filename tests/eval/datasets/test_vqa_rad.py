"""VQA-RAD as its authors released it: JSON with answer types, images as files, and a split by image."""

import json

import pytest
from tests.eval.datasets.releases import picture

from vitos.data.images import DataError
from vitos.eval.datasets.loading import load_benchmark


def row(image, question, answer, answer_type):
    return {"image": f"images/{image}.png", "question": question, "answer": answer, "answer_type": answer_type} | {
        "question_type": "PRES",
        "organ": "HEAD",
        "phrase_type": "freeform",
        "qid": "0",
    }


@pytest.fixture
def release(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(picture(number))
    train = [
        row(0, "Is it big?", "Yes", "CLOSED"),
        row(1, "Is it solid or cystic?", "Solid", "CLOSED"),
        row(2, "Where is it?", "left lobe\t", "OPEN"),
        row(2, "Is it open?", "no", "OPEN"),
        row(3, "What?", "a mass", "OTHER"),
        row(9, "Is it there?", "Yes", "CLOSED"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(
        json.dumps([row(0, "And here?", "No", "CLOSED"), row(2, "What?", "air", "OPEN")])
    )
    (tmp_path / "heldout_images.json").write_text('["2.png"]')
    return tmp_path


def load(release, split, tmp_path):
    return load_benchmark("vqa_rad", release, split, store=tmp_path / "store")


def test_every_row_has_its_kind(release, tmp_path):
    loaded = load(release, "train", tmp_path)
    assert [(r.question.removeprefix("<image>"), r.answer, r.kind) for r in loaded.records] == [
        ("Is it big?\nA. yes\nB. no", "A", "letter"),
        ("Is it solid or cystic?", "Solid", "word"),
        ("Where is it?", "left lobe", "text"),
        ("Is it open?\nA. yes\nB. no", "B", "letter"),
    ]
    assert loaded.records[0].meta["subset"] == "HEAD"
    assert [left.row for left in loaded.left_out] == ["train.json[4]", "train.json[5]"]


def test_the_split_by_image_shares_no_image(release, tmp_path):
    train, test = (load(release, f"{name}_by_image", tmp_path) for name in ("train", "test"))
    assert {path.name for r in train.records for path in r.image_paths} == {"0.png", "1.png"}
    assert [(r.id, r.answer) for r in test.records] == [
        ("vqa_rad/train.json[2]", "left lobe"),
        ("vqa_rad/train.json[3]", "B"),
        ("vqa_rad/test.json[1]", "air"),
    ]


def test_the_split_by_image_needs_the_names(release, tmp_path):
    (release / "heldout_images.json").unlink()
    with pytest.raises(DataError, match=r"holds no heldout_images\.json"):
        load(release, "test_by_image", tmp_path)
    (release / "heldout_images.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="no list of image names"):
        load(release, "test_by_image", tmp_path)
