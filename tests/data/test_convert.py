"""Conversion: round trips, `datasets` as the independent reader and writer, and nothing half-written."""

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import datasets

from vitos.core.geometry import Box
from vitos.data.convert import convert
from vitos.data.images import DataError
from vitos.data.readers import read_records

QUESTION = "<image>What?\nA. cyst\nB. nodule"


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    """A JSON set of 5 + 1 records on 3 images; c.png has the bytes of a.png."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(pixels(0)).save(folder / "images/a.png")
    Image.fromarray(pixels(1)).save(folder / "images/b.jpg")
    (folder / "images/c.png").write_bytes((folder / "images/a.png").read_bytes())
    train = [
        {
            "image_path": [f"images/{name}"],
            "question": QUESTION,
            "answer": "A",
            "bbox": [[0.1, 0.2, 0.3, 0.1 * (i + 3)]],
        }
        for i, name in enumerate(["a.png", "b.jpg", "c.png", "a.png"])
    ]
    train.append({"image_path": "images/b.jpg", "question": QUESTION, "answer": "B", "id": "ö", "meta": {"site": "x"}})
    train[0]["template"] = "t"
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(train[:1]))
    return folder


def contents(records):
    """Records without file names: the bytes of their images instead."""
    return [
        (r.id, r.question, r.answer, r.boxes, dict(r.meta), [p.read_bytes() for p in r.image_paths]) for r in records
    ]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def hf_file(path, rows, **features):
    """A parquet file as written by `datasets`."""
    base = {"question": datasets.Value("string"), "answer": datasets.Value("string")}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(base | features))
    table.to_parquet(path)
    return path


def test_round_trip(source, tmp_path):
    parquet, back = tmp_path / "parquet", tmp_path / "back"
    assert convert(source, parquet, to="parquet", shard_rows=2) == 6
    shards = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert names(parquet) == ["test-00000-of-00001.parquet", *shards]
    assert convert(parquet, back, to="json") == 6
    for split in ("train", "test"):
        assert contents(read_records(back, split=split)) == contents(read_records(source, split=split))
    data = [(source / "images" / name).read_bytes() for name in ("a.png", "b.jpg")]
    stored = {f"images/{hashlib.sha256(d).hexdigest()[:16]}{s}" for d, s in zip(data, (".png", ".jpg"), strict=True)}
    assert set(names(back)) == stored | {"train.json", "test.json"}  # c.png is not stored twice


def test_datasets_decodes_our_parquet(source, tmp_path):
    convert(source, tmp_path / "parquet", to="parquet")
    files = {"train": str(tmp_path / "parquet" / "train-*.parquet")}
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(table.features["image"], datasets.Image)
    assert np.array_equal(np.asarray(table[0]["image"]), pixels(0))
    assert table[4]["bbox"] is None
    assert table[0]["bbox"] == [[0.1, 0.2, 0.3, 0.1 * 3]]
    assert (table[0]["template"], table[1]["template"], table[4]["site"]) == ("t", None, "x")


def test_several_images(source, tmp_path):
    two = {"image_path": ["images/a.png", "images/b.jpg"], "question": "<image><image>Which?", "answer": "A"}
    one = {"image_path": ["images/b.jpg"], "question": QUESTION, "answer": "B"}
    (source / "pairs.json").write_text(json.dumps([two, one]))
    convert(source / "pairs.json", tmp_path / "parquet", to="parquet")
    file = tmp_path / "parquet" / "pairs-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert [image.format for image in table[0]["image"]] == ["PNG", "JPEG"]
    convert(file, tmp_path / "back", to="json")
    assert contents(read_records(tmp_path / "back")) == contents(read_records(source, split="pairs"))


def test_parquet_written_by_datasets(source, tmp_path):
    data = (source / "images/b.jpg").read_bytes()
    image = {"bytes": data, "path": None}
    row = {
        "image": image,
        "question": "What?",
        "answer": "A",
        "bbox": [[0, 0, 0.5, 1]],
        "id": 7,
        "age": 61,
        "site": None,
    }
    boxes = datasets.List(datasets.List(datasets.Value("float32")))
    columns = {"image": datasets.Image(), "bbox": boxes, "id": datasets.Value("int64"), "age": datasets.Value("int32")}
    hf_file(tmp_path / "val.parquet", [row], **columns, site=datasets.Value("string"))
    assert convert(tmp_path / "val.parquet", tmp_path / "json", to="json") == 1
    (record,) = read_records(tmp_path / "json", split="val")
    assert (record.id, record.question, record.meta) == ("7", "<image>What?", {"age": "61"})
    assert record.boxes == (Box(0, 0, 0.5, 1),)
    assert record.image_paths[0].read_bytes() == data  # not encoded again


def test_hub(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "parquet", to="parquet")
    real = datasets.load_dataset
    files = {split: str(tmp_path / "parquet" / f"{split}-*.parquet") for split in ("train", "test")}

    def load(name, *, streaming):
        assert (name, streaming) == ("owner/set", True)
        return real("parquet", data_files=files, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert convert("hub:owner/set", tmp_path / "json", to="json") == 6
    assert contents(read_records(tmp_path / "json", split="train")) == contents(read_records(source, split="train"))
    with pytest.raises(DataError, match="hub:owner/name"):
        convert("hub:../x/y", tmp_path / "other", to="json")


def test_limit_is_per_split(source, tmp_path):
    assert convert(source, tmp_path / "p", to="parquet", limit=2) == 3
    assert convert(tmp_path / "p", tmp_path / "j", to="json", limit=1) == 2


# Refusals: named, and nothing left


def no_trace(tmp_path, target="target"):
    return not any(path.name.startswith(target) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "yes"}, r"bad.parquet\[0\], answer"),
        ({"bbox": [[0.0, 0.0, float("nan"), 1.0]]}, r"bad.parquet\[0\], bbox\[0\].*finite"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}}, r"bad.parquet\[0\], image: .* no bytes"),
        ({"image": {"bytes": b"text", "path": None}}, r"bad.parquet\[0\]: not an image"),
        ({"image": None}, r"bad.parquet\[0\], image"),
        ({"extra": [1]}, r"bad.parquet\[0\], extra"),
    ],
)
def test_bad_rows(source, tmp_path, change, message):
    image = {"bytes": (source / "images/a.png").read_bytes(), "path": "a.png"}
    row = {"image": image, "question": QUESTION, "answer": "A", "bbox": [[0.0, 0.0, 1.0, 1.0]]} | change
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({k: pa.array([v], image_type) if k == "image" else pa.array([v]) for k, v in row.items()})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "bad.parquet", tmp_path / "target", to="json")
    assert no_trace(tmp_path)


def test_bad_sources(source, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="not a readable parquet"):
        convert(tmp_path / "x.parquet", tmp_path / "target", to="json")
    for wrong in (source, tmp_path / "none.parquet"):
        with pytest.raises(DataError, match=r"no \.parquet file"):
            convert(wrong, tmp_path / "target", to="json")
    with pytest.raises(DataError, match="vitos data convert"):
        convert(tmp_path / "x.parquet", tmp_path / "target", to="parquet")
    (source / "images/b.jpg").unlink()
    with pytest.raises(DataError, match=r"train.json\[1\], image_path"):
        convert(source / "train.json", tmp_path / "target", to="parquet")
    assert no_trace(tmp_path)


def test_meta_must_not_hide_a_column(source, tmp_path):
    (source / "test.json").write_text(
        json.dumps([json.loads((source / "test.json").read_text())[0] | {"meta": {"bbox": "x"}}])
    )
    with pytest.raises(DataError, match="test/0, meta: 'bbox'"):
        convert(source / "test.json", tmp_path / "target", to="parquet")


def test_parquet_cannot_hold_a_selector(source, tmp_path):
    file = next(source.glob("*.json"))
    rows = json.loads(file.read_text())
    name = rows[0]["image_path"]
    rows[0]["image_path"] = f"{name[0] if isinstance(name, list) else name}#window=1,2"
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="selects a part of a file, which parquet cannot"):
        convert(str(source), tmp_path / "target", to="parquet")
    assert no_trace(tmp_path)


def test_an_existing_target_is_kept(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not an empty folder"):
        convert(source, target, to="parquet")
    assert names(target) == ["mine.txt"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "No space left on device"), DataError), (KeyboardInterrupt(), None)]
)
@pytest.mark.parametrize("to", ["json", "parquet"])
def test_full_disk_and_ctrl_c_leave_nothing(source, tmp_path, monkeypatch, to, error, raised):
    """The second write of an image, or of a parquet row group, fails."""
    start = source
    if to == "json":
        start = tmp_path / "parquet"
        convert(source, start, to="parquet")
    owner, method = (Path, "write_bytes") if to == "json" else (pq.ParquetWriter, "write_table")
    original, calls = getattr(owner, method), []

    def failing(self, *args):
        calls.append(self)
        if len(calls) == 2:
            assert (tmp_path / "target.partial").is_dir()
            raise error
        return original(self, *args)

    monkeypatch.setattr(owner, method, failing)
    with pytest.raises(raised or KeyboardInterrupt, match="disk is full" if raised else None):
        convert(start, tmp_path / "target", to=to)
    assert len(calls) == 2
    assert no_trace(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_arrow_reports_a_full_disk_by_the_number_we_look_for():
    """Through an open file: `pq.write_table(path)` removes its path when it fails, and root would lose the device."""
    with pa.OSFile("/dev/full", "wb") as file, pytest.raises(OSError, match="No space left") as caught:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("options", [{"to": "csv"}, {"to": "json", "limit": 0}, {"to": "json", "shard_rows": 0}])
def test_options(source, tmp_path, options):
    with pytest.raises(ValueError, match="must be"):
        convert(source, tmp_path / "target", **options)


def test_answers_of_every_kind_survive_parquet(tmp_path):
    source = tmp_path / "json"
    (source / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(source / "images/a.png")
    common = {"image_path": "images/a.png", "question": "What is it?"}
    rows = [
        common | {"answer": "12 mm", "kind": "number", "tolerance": "10 %", "accepted": ["0.5 inch"]},
        common | {"answer": ["effusion", "mass"], "kind": "list"},
        common | {"answer": "a cyst", "kind": "text", "accepted": ["fluid", "a fluid collection"]},
        common | {"question": "Is it?\nA. yes\nB. no", "answer": "B"},
    ]
    (source / "train.json").write_text(json.dumps(rows))
    convert(source, tmp_path / "parquet", to="parquet")
    convert(tmp_path / "parquet", tmp_path / "back", to="json")
    before, after = (read_records(folder / "train.json") for folder in (source, tmp_path / "back"))
    for one, other in zip(before, after, strict=True):
        assert replace(one, image_paths=()) == replace(other, image_paths=())
    letters = tmp_path / "letters"
    (letters / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(letters / "images/a.png")
    (letters / "train.json").write_text(json.dumps(rows[3:]))
    convert(letters, tmp_path / "plain", to="parquet")
    (shard,) = (tmp_path / "plain").glob("*.parquet")
    assert not {"kind", "accepted", "tolerance"} & set(pq.read_schema(shard).names)
