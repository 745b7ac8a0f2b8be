"""Annotations of other programs ↔ records: files as their own documents show them, and round trips."""

import csv
import json

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.data import dicom_files as dicom

from vitos.core.geometry import Box
from vitos.data.boxed import FORMATS, NOTHING, convert_boxed
from vitos.data.check import check_dataset
from vitos.data.images import DataError
from vitos.data.readers import read_records


def picture(path, width=80, height=60, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)
    return path


def records_of(source, target, form, images=None, split="train"):
    """Converted records, which `vitos data check` finds nothing wrong with; category → boxes by question."""
    convert_boxed(source, target, form, None, images)
    assert [p for p in check_dataset(target / f"{split}.json").problems if p.severity == "error"] == []
    return read_records(target / f"{split}.json")


def marks(records):
    """(category, boxes in thousandths) of each record, in order."""
    return [
        (r.meta.get("category", ""), [tuple(round(1000 * v) for v in box.as_tuple()) for box in r.boxes or ()])
        for r in records
    ]


# --- files as other programs write them -----------------------------------------------------------------------------

# The form of cocodataset.org/#format-data, with the fields that detection has.
COCO = {
    "info": {"year": 2017, "version": "1.0"},
    "licenses": [],
    "images": [
        {"id": 397133, "file_name": "a.png", "width": 80, "height": 60, "license": 1},
        {"id": 37777, "file_name": "deep/b.png", "width": 40, "height": 30},
    ],
    "categories": [
        {"id": 1, "name": "cyst", "supercategory": "lesion"},
        {"id": 18, "name": "mass", "supercategory": "lesion"},
    ],
    "annotations": [
        {"id": 1, "image_id": 397133, "category_id": 18, "bbox": [8, 6, 16, 12], "area": 192, "iscrowd": 0,
         "segmentation": [[8, 6, 24, 6, 24, 18, 8, 18]]},
        {"id": 2, "image_id": 397133, "category_id": 18, "bbox": [40.0, 30.0, 40.4, 30.0], "area": 1212, "iscrowd": 0},
        {"id": 3, "image_id": 397133, "category_id": 1, "bbox": [0, 0, 8, 6], "area": 48, "iscrowd": 1},
    ],
}  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    picture(tmp_path / "coco/images/a.png")
    picture(tmp_path / "coco/images/deep/b.png", 40, 30, seed=1)
    (tmp_path / "coco/train.json").write_text(json.dumps(COCO))
    return tmp_path / "coco/train.json"


def test_coco(coco, tmp_path):
    records = records_of(coco, tmp_path / "out", "coco")
    assert marks(records) == [
        ("cyst", [(0, 0, 100, 100)]),
        ("mass", [(100, 100, 300, 300), (500, 500, 1000, 1000)]),
        (NOTHING, []),
    ]
    assert [record.options[record.answer] for record in records] == ["cyst", "mass", NOTHING]
    assert set(records[0].options.values()) == {"cyst", NOTHING}  # a mass is in the image, too, so it is no option
    assert set(records[2].options.values()) == {"cyst", "mass", NOTHING}
    folder = records_of(coco.parent, tmp_path / "folder", "coco", coco.parent / "images")
    assert marks(folder) == marks(records)


# docs.ultralytics.com/datasets/detect: names as a mapping, paths relative to `path`, one label file per image.
YOLO = "path: ../no-such-folder\ntrain: images/train\nval: images/val\n\nnames:\n  0: cyst\n  1: mass\n"


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for name, split in (("a", "train"), ("b", "train"), ("c", "val")):
        picture(root / f"images/{split}/{name}.png", seed=ord(name))
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/a.txt").write_text("1 0.2 0.2 0.2 0.2\n0 0.5 0.5 0.7 0.5 0.6 0.9\n")
    (root / "data.yaml").write_text(YOLO)
    return root


def test_yolo(yolo, tmp_path):
    records = records_of(yolo, tmp_path / "out", "yolo")
    assert marks(records) == [("cyst", [(500, 500, 700, 900)]), ("mass", [(100, 100, 300, 300)]), (NOTHING, [])]
    assert marks(read_records(tmp_path / "out/val.json")) == [(NOTHING, [])]
    (yolo / "data.yaml").write_text("train: images/train\nnames: [cyst, mass]\n")
    assert marks(records_of(yolo / "data.yaml", tmp_path / "list", "yolo")) == marks(records)


def test_masks(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"images/{name}.jpg")
    mask = np.zeros((60, 80), np.uint8)
    mask[6:12, 8:16] = 255
    mask[12:18, 16:24] = 1  # touches the first part at a corner
    mask[54:60, 72:80] = 7
    (tmp_path / "masks/mass").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "masks/mass/a.png")
    records = records_of(tmp_path / "masks", tmp_path / "out", "masks", tmp_path / "images")
    assert marks(records) == [("mass", [(100, 100, 300, 300), (900, 900, 1000, 1000)]), (NOTHING, [])]
    Image.fromarray(mask[:, :40]).save(tmp_path / "masks/mass/b.png")
    with pytest.raises(DataError, match=r"b\.jpg: image and masks have different sizes"):
        convert_boxed(tmp_path / "masks", tmp_path / "bad", "masks", None, tmp_path / "images")
    assert not (tmp_path / "bad").exists()


# The header of VinDr-CXR's train.csv.
VINDR = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
one,Nodule/Mass,8,R10,100,100,300,300
one,Nodule/Mass,8,R9,120,100,320,300
one,Nodule/Mass,8,R9,600,700,640,740
one,Cardiomegaly,3,R9,200,400,800,800
two,No finding,14,R9,,,,
"""


@pytest.mark.parametrize("suffix", ["png", "dicom"])
def test_vindr(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(("one", "two")):
        if suffix == "png":
            picture(tmp_path / f"images/{name}.png", 1000, 800, seed)
        else:
            dicom.write(
                tmp_path / f"images/{name}.dicom", dicom.ramp(shape=(800, 1000), step=seed + 1).astype(np.int16)
            )
    (tmp_path / "train.csv").write_text(VINDR)
    records = records_of(tmp_path / "train.csv", tmp_path / "out", "vindr")
    assert marks(records) == [
        ("Cardiomegaly", [(200, 500, 800, 1000)]),
        ("Nodule/Mass", [(110, 125, 310, 375), (600, 875, 640, 925)]),  # two readers agree on the first
        (NOTHING, []),
    ]
    assert records[0].image_paths[0].suffix == ".png"


def test_vindr_with_the_size_of_the_original(tmp_path):
    for name in ("one", "two"):
        picture(tmp_path / f"images/{name}.png", 100, 80)
    rows = list(csv.DictReader(VINDR.splitlines()))
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "width", "height"])
        writer.writeheader()
        writer.writerows(row | {"width": 1000, "height": 800} for row in rows)
    assert marks(records_of(tmp_path / "train.csv", tmp_path / "out", "vindr"))[0][1] == [(200, 500, 800, 1000)]


def test_visual_cot(tmp_path):
    picture(tmp_path / "images/a.png", 100, 50)
    row = {
        "question": "What is left of the heart?", "answer": "a nodule", "possible_answers": ["a nodule", "nodule"],
        "image": "a.png", "width": 200, "height": 100, "bboxs": [[20, 10, 60, 50], [0, 0, 200, 100]],
        "dataset": "flickr30k", "split": "train",
    }  # fmt: skip
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n\n")
    with pytest.raises(DataError, match="line 2"):
        convert_boxed(tmp_path / "train.jsonl", tmp_path / "bad", "visual_cot", None, tmp_path / "images")
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = records_of(tmp_path / "train.jsonl", tmp_path / "out", "visual_cot", tmp_path / "images")
    assert (record.question, record.answer) == ("<image>What is left of the heart?", "a nodule")
    assert (record.kind, record.accepted) == ("text", ("nodule",))
    assert marks([record])[0][1] == [(100, 100, 300, 500), (0, 0, 1000, 1000)]


# --- there and back -------------------------------------------------------------------------------------------------

EDGES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 39), st.integers(1, 19))
NAMES = st.sampled_from(["cyst", "mass", "pleural effusion", "Nodule/Mass"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.tuples(st.integers(0, 1), NAMES, EDGES), min_size=1, max_size=6))
@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_records_come_back(found, form, tmp_path_factory):
    """COCO → records → format → records: the same boxes of the same category in the same image."""
    tmp = tmp_path_factory.mktemp("back")
    names = sorted({name for _, name, _ in found})
    for number in (0, 1):
        picture(tmp / f"{number}.png", seed=number)
    annotations = [
        {"id": i, "image_id": image, "category_id": names.index(name), "bbox": [x, y, w, h]}
        for i, (image, name, (x, y, w, h)) in enumerate(found)
    ]
    images = [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in (0, 1)]
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    (tmp / "train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    first = records_of(tmp / "train.json", tmp / "first", "coco")
    convert_boxed(tmp / "first", tmp / "middle", None, form)
    second = records_of(tmp / "middle", tmp / "second", form)

    def known(records):
        return {
            (r.image_paths[0].read_bytes(), r.meta["category"], tuple(round(v, 9) for v in box.as_tuple()))
            for r in records
            for box in r.boxes or ()
        }

    expected = {(picture_bytes(tmp, i), name, fractions(edges)) for i, name, edges in found}
    assert known(first) == expected
    assert known(second) == expected


def picture_bytes(folder, number):
    return (folder / f"{number}.png").read_bytes()


def fractions(edges):
    x, y, w, h = edges
    return tuple(round(v, 9) for v in (x / 80, y / 60, (x + w) / 80, (y + h) / 60))


def test_what_is_written_has_the_form_of_the_other_program(phantom_records, tmp_path):
    rows = [
        {"image_path": str(r.image_paths[0].name), "question": r.question, "answer": r.answer,
         "bbox": [box.to_json() for box in r.boxes]}
        for r in phantom_records
    ]  # fmt: skip
    for record in phantom_records:
        (tmp_path / record.image_paths[0].name).write_bytes(record.image_paths[0].read_bytes())
    (tmp_path / "val.json").write_text(json.dumps(rows))
    assert convert_boxed(tmp_path / "val.json", tmp_path / "coco", None, "coco") == len(rows)
    data = json.loads((tmp_path / "coco/val.json").read_text())
    ids = {image["id"] for image in data["images"]}
    assert {a["image_id"] for a in data["annotations"]} <= ids
    for image in data["images"]:
        assert Image.open(tmp_path / "coco/images" / image["file_name"]).size == (image["width"], image["height"])
    names = {c["id"]: c["name"] for c in data["categories"]}
    right = {r.options[r.answer] for r in phantom_records}
    assert {names[a["category_id"]] for a in data["annotations"]} == right
    convert_boxed(tmp_path / "val.json", tmp_path / "yolo", None, "yolo")
    config = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert set(config["names"].values()) == right
    for image in (tmp_path / "yolo" / config["val"]).iterdir():
        labels = (tmp_path / "yolo/val/labels" / f"{image.stem}.txt").read_text().split("\n")
        assert all(len(line.split()) == 5 for line in labels if line)


# --- what cannot be converted ---------------------------------------------------------------------------------------


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(bbox=[8, 6, 90, 12]), "annotation 1: the box .* leaves its image"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, 0, 12]), "annotation 1: the box .* is empty"),
        (lambda d: d["annotations"][0].update(bbox=[8, 6, float("nan"), 12]), "annotation 1: the box .* leaves"),
        (lambda d: d["annotations"][0].update(category_id=5), "not a COCO detection file"),
        (lambda d: d["annotations"][0].update(image_id=5), "annotations name image 5"),
        (
            lambda d: d["images"][0].update(width=60, height=80),
            "image 397133: is 80 x 60 pixels, but was annotated as",
        ),
        (lambda d: d["images"][0].update(file_name="c.png"), r"c\.png"),
        (lambda d: d.pop("categories"), "not a COCO detection file"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named(coco, tmp_path, change, message):
    changed(coco, change)
    with pytest.raises((DataError, OSError), match=message):
        convert_boxed(coco, tmp_path / "out", "coco", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", ["2 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 a b c d", "0 0.9 0.5 0.4 0.1", "0 0.1 0.1 0.2 0.2 0.3"]
)
def test_a_label_that_cannot_be_used_is_named(yolo, tmp_path, line):
    (yolo / "labels/train/a.txt").write_text(f"1 0.2 0.2 0.2 0.2\n{line}\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2"):
        convert_boxed(yolo, tmp_path / "out", "yolo", None)


def test_formats_are_found_by_listing_the_folder(tmp_path):
    assert set(FORMATS.names()) == {"coco", "yolo", "masks", "vindr", "visual_cot"}
    with pytest.raises(ValueError, match="'voc' is none of coco, masks"):
        convert_boxed(tmp_path, tmp_path / "out", "voc", None)
    with pytest.raises(ValueError, match="vindr can be read only"):
        convert_boxed(tmp_path, tmp_path / "out", None, "vindr")
    with pytest.raises(ValueError, match="name one format"):
        convert_boxed(tmp_path, tmp_path / "out", "coco", "yolo")


def test_the_command(coco, tmp_path):
    from typer.testing import CliRunner

    from vitos.cli.main import app

    call = CliRunner().invoke
    done = call(app, ["data", "convert", str(coco), str(tmp_path / "out"), "--from", "coco"])
    assert done.exit_code == 0, done.output
    assert "3 questions" in done.output
    assert call(app, ["data", "convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "yolo"]).exit_code == 0
    assert Box(*read_records(tmp_path / "out/train.json")[0].boxes[0].as_tuple()) == Box(0, 0, 0.1, 0.1)
    assert (tmp_path / "back/data.yaml").is_file()
