"""Every loader on a release in the exact layout of the hub, and on one with a damaged file."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from tests.eval.datasets import releases

from vitos.data.images import DataError, load_image
from vitos.eval.datasets import loading
from vitos.eval.datasets.loading import DATASETS, Benchmark, Release, get_benchmark, load_benchmark, register


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "release").mkdir()
    return tmp_path / "release"


@pytest.fixture
def load(tmp_path, folder):
    """`load(name)`: the release in `folder`, images kept in a store of this test."""

    def load(name, split=None, **more):
        return load_benchmark(name, folder, split, store=tmp_path / "store", **more)

    return load


def rows(loaded):
    return [(r.question, r.answer, r.kind, len(r.image_paths)) for r in loaded.records]


def check(loaded, expected):
    assert rows(loaded) == expected.good
    reasons = [reason for _, reason in loaded.left_out]
    assert len(reasons) == len(expected.bad), reasons
    for reason, part in zip(reasons, expected.bad, strict=True):
        assert part in reason
    names = [record.id for record in loaded.records] + [f"{loaded.name}/{row}" for row, _ in loaded.left_out]
    assert len(set(names)) == len(names)


def test_every_benchmark_has_a_release_here():
    assert set(releases.WRITERS) == set(DATASETS.names())
    assert all(get_benchmark(name).name == name for name in DATASETS.names())


@pytest.mark.parametrize("name", DATASETS.names())
def test_release(name, folder, load):
    expected = releases.WRITERS[name](folder)
    loaded = load(name)
    check(loaded, expected)
    assert loaded.split == get_benchmark(name).splits[0]
    for record in loaded.records:
        assert record.question.count("<image>") == len(record.image_paths)
        assert (record.kind == "letter") == bool(record.options)
        assert record.kind != "letter" or record.answer in record.options
        for path in record.image_paths:
            assert load_image(path).mode == "RGB"
    assert rows(load(name)) == rows(loaded), "a second reading, out of the store"
    assert rows(load(name, limit=2)) == rows(loaded)[:2]


@pytest.mark.parametrize(
    ("name", "write"),
    [("slake", releases.write_slake), ("omnimedvqa", releases.write_omnimedvqa)],
    ids=["slake", "omnimedvqa"],
)
def test_unpacked_archives(name, write, folder, load, tmp_path):
    expected = write(folder, unpacked=True)
    check(load(name), expected)
    assert not (tmp_path / "store").exists()


def test_version_one_of_pmc_vqa(folder, load):
    expected = releases.write_pmc_vqa_1(folder)
    check(load("pmc_vqa", "test_clean"), expected)


def test_fields_for_tables(folder, load, tmp_path):
    def of(name):
        (tmp_path / name).mkdir()
        releases.WRITERS[name](tmp_path / name)
        return [dict(r.meta) for r in load_benchmark(name, tmp_path / name, store=tmp_path / "store").records]

    assert [meta["question_type"] for meta in of("vqa_rad")] == ["yes/no", "yes/no", "open", "yes/no"]
    slake = of("slake")
    assert slake[0] == {
        "question_type": "Organ", "modality": "CT", "subset": "en", "location": "Lung", "answer_type": "CLOSED"
    }  # fmt: skip
    assert slake[3]["subset"] == "zh"
    assert "modality" not in slake[4]
    omni = of("omnimedvqa")
    assert omni[0] == {
        "question_type": "Modality Recognition", "modality": "Microscopy Images", "subset": "Blood Cell"
    }  # fmt: skip
    assert (omni[3]["modality"], omni[3]["subset"]) == ("CT", "Chest CT")
    mmmu = of("mmmu_medical")
    assert (mmmu[1]["subset"], mmmu[1]["modality"]) == ("Clinical_Medicine", "CT scans, MRI")
    assert of("medxpertqa")[0] == {"question_type": "Reasoning", "subset": "Diagnosis", "body_system": "Nervous"}
    bundle = of("medical_bundle")
    assert bundle[0] == {"subset": "OmniMedVQA", "part": "X-Ray", "modality": "X-Ray"}
    assert bundle[1] == {"subset": "VQA-RAD", "part": "closed"}


def test_images_of_a_question_are_in_the_order_of_its_text(folder, load):
    releases.write_mmmu_medical(folder)
    (record,) = [r for r in load("mmmu_medical").records if len(r.image_paths) == 3]
    assert [load_image(path).width for path in record.image_paths] == [30, 24, 40]  # images 2, 1 and 3


def test_pixels_are_those_of_the_release(folder, load):
    releases.write_vqa_rad(folder)
    first = load("vqa_rad").records[0].image_paths[0]
    assert first.read_bytes() == releases.picture(1)
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(load_image(first)))


# --- damage ---------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(releases.truncated(path.read_bytes()))


def test_a_damaged_shard_is_named_and_the_others_are_read(folder, load):
    expected = releases.write_path_vqa(folder)
    cut(folder / "data/test-00001-of-00002-def.parquet")
    loaded = load("path_vqa")
    assert rows(loaded) == expected.good[:4]
    row, reason = loaded.left_out[-1]
    assert row == "data/test-00001-of-00002-def.parquet"
    assert "not a readable parquet file" in reason


def test_a_damaged_row_group_is_named_by_its_rows(folder, load):
    expected = releases.write_vqa_rad(folder)
    file = folder / "data/test-00000-of-00001-abc.parquet"
    data = bytearray(file.read_bytes())
    data[4:60] = b"\xff" * 56  # the first pages of the first row group, rows 0 and 1
    file.write_bytes(bytes(data))
    loaded = load("vqa_rad")
    assert rows(loaded) == expected.good[2:]
    assert loaded.left_out[0][0] == "data/test-00000-of-00001-abc.parquet[0:2]"
    assert "2 rows cannot be decoded" in loaded.left_out[0][1]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("slake", "imgs.zip"),
        ("pmc_vqa", "images_2.zip"),
        ("omnimedvqa", "OmniMedVQA.zip"),
        ("medxpertqa", "images.zip"),
        ("medical_bundle", "images.zip"),
    ],
)
def test_a_damaged_archive_is_refused_by_name(name, file, folder, load):
    releases.WRITERS[name](folder)
    cut(folder / file)
    with pytest.raises(DataError, match=rf"{file}: not a readable zip archive"):
        load(name)


def test_a_damaged_file_in_an_archive_costs_its_questions(folder, load):
    expected = releases.write_pmc_vqa(folder)
    archive = folder / "images_2.zip"
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo("figures/PMC1_F1.jpg")
    start = info.header_offset + 30 + len(info.filename)
    data[start + 40 : start + 80] = b"\x00" * 40
    archive.write_bytes(bytes(data))
    loaded = load("pmc_vqa")
    assert rows(loaded) == expected.good[1:]
    assert loaded.left_out[0][0] == "test_2.csv[0]"
    assert "images_2.zip/figures/PMC1_F1.jpg: is damaged" in loaded.left_out[0][1]


def test_one_damaged_question_file_of_many(folder, load):
    expected = releases.write_omnimedvqa(folder, unpacked=True)
    cut(folder / "OmniMedVQA/QA_information/Open-access/Blood Cell.json")
    loaded = load("omnimedvqa")
    assert rows(loaded) == expected.good[3:]
    ((row, reason),) = loaded.left_out
    assert row == "OmniMedVQA/QA_information/Open-access/Blood Cell.json"
    assert "not a readable JSON file" in reason


@pytest.mark.parametrize(("name", "file"), [("slake", "test.json"), ("medical_bundle", None)])
def test_without_one_usable_row_there_is_no_benchmark(name, file, folder, load):
    releases.WRITERS[name](folder)
    cut(folder / (file or "medical_multimodel_evaluation_data.json"))
    with pytest.raises(DataError, match=r"no question of .* can be used \(.*json: not a readable JSON file"):
        load(name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"7,PMC1_F1.jpg,c,q", "fewer fields"),
        (b"7,PMC1_F1.jpg,c,q,A:x,B:y,C:z,D:w,A,test,more", "more fields"),
        (b"7,PMC1_F1.jpg,c,q\xff,A:x,B:y,C:z,D:w,A,test", "not UTF-8"),
        (b"7,PMC1_F1.jpg,c," + b"q" * 10_000_001 + b",A:x,B:y,C:z,D:w,A,test", "not CSV"),
    ],
)
def test_a_damaged_csv_row_does_not_move_the_others(line, reason, folder, load):
    expected = releases.write_pmc_vqa(folder)
    header, *others = (folder / "test_2.csv").read_bytes().split(b"\r\n", 1)
    (folder / "test_2.csv").write_bytes(b"\r\n".join([header, line, *others]))
    loaded = load("pmc_vqa")
    assert rows(loaded) == expected.good
    assert loaded.left_out[0][0] == "test_2.csv[0]"
    assert reason in loaded.left_out[0][1]
    assert loaded.records[0].id == "pmc_vqa/test_2.csv[1]"


def test_a_symbolic_link_out_of_the_folder_is_no_image(folder, load, tmp_path):
    expected = releases.write_slake(folder, unpacked=True)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(releases.picture(5, "JPEG"))
    (folder / "imgs/xmlab1/source.jpg").unlink()
    (folder / "imgs/xmlab1/source.jpg").symlink_to(secret)
    loaded = load("slake")
    assert rows(loaded) == expected.good[2:]
    assert "symlink out of" in loaded.left_out[0][1]


def test_an_archive_with_a_path_out_of_the_folder_is_refused(folder, load):
    releases.write_slake(folder)
    releases.write_zip(folder / "imgs.zip", {"../evil.jpg": b"x"})
    with pytest.raises(DataError, match=r"imgs\.zip: holds '\.\./evil\.jpg', which would leave the folder"):
        load("slake")


# --- asking for what is not there -----------------------------------------------------------------------------------


def test_what_is_not_there_is_said(folder, load):
    with pytest.raises(ValueError, match=r"no benchmark 'vqarad'; known are medical_bundle, .*, vqa_rad"):
        load("vqarad")
    with pytest.raises(ValueError, match="vqa_rad has no split 'dev'; it has test, train"):
        load("vqa_rad", "dev")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("vqa_rad", limit=0)
    with pytest.raises(DataError, match=r"holds no data/test-\*\.parquet"):
        load("vqa_rad")
    with pytest.raises(DataError, match="no such folder"):
        load_benchmark("vqa_rad", folder / "none")


def test_the_hub_is_asked_for_the_files_of_one_split(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = releases.write_slake(folder)
    loaded = load_benchmark("slake", store=tmp_path / "store")
    assert rows(loaded) == expected.good
    assert loaded.source == "hub:BoKelvin/SLAKE"
    assert asked == [("BoKelvin/SLAKE", {"repo_type": "dataset", "allow_patterns": ["test.json", "imgs.zip"]})]
    load_benchmark("slake", "hub:me/mirror", store=tmp_path / "store")
    assert asked[1][0] == "me/mirror"


def test_the_store_may_be_given_as_text(folder, tmp_path, monkeypatch):
    releases.write_vqa_rad(folder)
    expected = load_benchmark("vqa_rad", str(folder), store=tmp_path / "one")
    loaded = load_benchmark("vqa_rad", str(folder), store=str(tmp_path / "two"))
    assert rows(loaded) == rows(expected)
    assert all(path.is_relative_to(tmp_path / "two") for record in loaded.records for path in record.image_paths)
    monkeypatch.setenv("HOME", str(tmp_path))
    load_benchmark("vqa_rad", folder, store="~/three")
    assert (tmp_path / "three").is_dir()


def test_every_row_that_is_left_out_is_kept_with_its_reason(folder, load):
    expected = releases.write_slake(folder)
    rows_left = load("slake").left_out
    assert len(rows_left) == len(expected.bad)
    assert [(part.row, part.reason) for part in rows_left] == list(rows_left)
    assert json.loads(json.dumps(rows_left)) == [list(part) for part in rows_left]


def test_a_benchmark_that_a_script_registers(folder, load, monkeypatch):
    from vitos.eval.datasets.questions import ParsedRow
    from vitos.eval.datasets.rows import json_rows

    monkeypatch.setattr(loading, "_REGISTERED", dict(loading._REGISTERED))
    register(
        Benchmark(
            name="mine",
            hub="me/mine",
            files=lambda split: ["mine.json"],
            splits=("test",),
            release=lambda folder, split: Release(json_rows(folder, [folder / "mine.json"])),
            question=lambda row: ParsedRow(text=row["q"], images=(row["i"],), answer=row["a"], kind="text"),
        )
    )
    (folder / "a.png").write_bytes(releases.picture(1))
    (folder / "mine.json").write_text(json.dumps([{"q": "What?", "i": "a.png", "a": "it"}]), encoding="utf-8")
    assert rows(load("mine")) == [("<image>What?", "it", "text", 1)]
