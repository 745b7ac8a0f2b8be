"""The check finds everything at once, and refuses exactly what reading refuses."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitos.data import check as check_module
from vitos.data import looks
from vitos.data.check import check_dataset, render_check
from vitos.data.images import DataError
from vitos.data.readers import read_records

REAL = Path(__file__).parents[3] / "shared" / "data"


def add(folder, name, image, **options):
    (folder / "images").mkdir(exist_ok=True)
    image.save(folder / "images" / name, **options)


def noise(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def item(image, **changes):
    base = {"image_path": [f"images/{image}"], "question": "<image>What?\nA. cyst\nB. nodule", "answer": "A"}
    return base | {"bbox": [[0, 0, 0.5, 0.5]]} | changes


def write(folder, items, name="train.json"):
    (folder / name).write_text(json.dumps(items))
    return folder / name


def found(report):
    return {(p.severity, p.sample, p.field) for p in report.problems}


def printed(report, **options):
    console = Console(file=io.StringIO(), width=200)
    console.print(render_check(report, **options))
    return console.file.getvalue()


def test_a_sound_set(tmp_path):
    add(tmp_path, "a.png", noise(0))
    add(tmp_path, "b.png", noise(1, (40, 30)))
    items = [
        item("a.png"),
        item("b.png", answer="B", template="t"),
        item("b.png", question="<image>Where?\nA. left\nB. right", bbox=[[0, 0, 0.1, 1], [0, 0, 1, 0.3]]),
    ]
    calls = []
    report = check_dataset(write(tmp_path, items), progress=lambda done, total: calls.append((done, total)))
    assert report.problems == ()
    assert (report.items, report.records, report.images, report.boxes) == (3, 3, 2, 4)
    assert (report.answers, report.templates) == ({"A": 2, "B": 1}, {"t": 1})
    assert report.evidence_share == pytest.approx(0.25)  # of 0.25, 0.25 and 0.4
    assert (report.smallest, report.largest) == ((24, 16), (40, 30))
    assert calls == [(1, 2), (2, 2)]
    report.raise_if_errors()
    assert "No problems" in printed(report)
    assert "3 valid of 3" in printed(report)


def test_windows_of_one_file_are_images_of_their_own(tmp_path):
    """Two windows are no duplicates; two files with one window are."""
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    add(tmp_path, "a.png", deep)
    add(tmp_path, "b.png", deep)
    names = ["a.png#window=100,50", "a.png#window=300,50", "b.png#window=100,50"]
    report = check_dataset(write(tmp_path, [item(name) for name in names]))
    assert report.images == 3
    (same,) = [p for p in report.of("note") if "same picture" in p.problem]
    assert "2 files show the same picture: a.png#window=100,50, b.png#window=100,50" in same.problem
    broken = check_dataset(write(tmp_path, [item("a.png#axis=1&slice=2")]))
    assert "PNG knows no axis or slice" in broken.of("error")[0].problem


def test_burned_in_text_is_a_warning(tmp_path):
    data = pytest.importorskip("pydicom.data", reason="the dicom extra is not installed")
    (tmp_path / "images").mkdir()
    source = Path(data.get_testdata_file("examples_ybr_color.dcm", download=False))
    (tmp_path / "images" / "us.dcm").write_bytes(source.read_bytes())
    report = check_dataset(write(tmp_path, [item("us.dcm#frame=30")]))
    assert [p.problem for p in report.of("warning")] == [
        "us.dcm#frame=30: text may be burned into its pixels; look for names before sharing or training on it"
    ]
    assert "frame=31 is not there" in check_dataset(write(tmp_path, [item("us.dcm#frame=31")])).problems[0].problem


def test_pictures_without_anything_to_see_are_a_warning(tmp_path):
    """One colour, nearly black, and a window that shows nothing; a dark picture with something in it passes."""
    add(tmp_path, "one.png", Image.new("RGB", (8, 8), (90, 20, 20)))
    add(tmp_path, "black.png", Image.fromarray(np.asarray(noise(0)) // 9))
    add(tmp_path, "deep.png", Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)))
    add(tmp_path, "dark.png", Image.fromarray(np.asarray(noise(1)) // 3))
    names = ["one.png", "black.png", "deep.png#window=5000,10", "dark.png"]
    warnings = check_dataset(write(tmp_path, [item(name) for name in names])).of("warning")
    assert [(p.sample, p.problem) for p in warnings] == [
        ("train.json[0]", "one.png: shows one colour only"),
        ("train.json[1]", "black.png: is nearly black (28 of 255 at most)"),
        ("train.json[2]", "deep.png#window=5000,10: shows one colour only"),
    ]


def test_everything_is_found_at_once(tmp_path):
    add(tmp_path, "a.png", noise(0))
    add(tmp_path, "same.png", noise(0))
    add(tmp_path, "cut.jpg", noise(1, (64, 64)))
    cut = tmp_path / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    add(tmp_path, "tiny.png", Image.new("L", (1, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    add(tmp_path, "turned.jpg", noise(2), exif=exif)
    add(tmp_path, "cmyk.jpg", noise(3).convert("CMYK"))
    items = [
        item("a.png", id="x"),
        item("same.png", id="x"),  # 1
        item("cut.jpg", bbox=[[0, 0, 3, 3]]),  # 2: its image is decoded although its box is wrong
        item("tiny.png"),  # 3
        item("turned.jpg", answer="C"),  # 4
        item("cmyk.jpg", question="<image>What is it?"),  # 5
        item("none.png", bbox=[[0.5, 0, 0.4, 1], [0, 0, 0, 1]]),  # 6
        7,
    ]
    report = check_dataset(write(tmp_path, items))
    assert found(report) == {
        ("note", "train.json[0]", "image_path"),
        ("error", "train.json[1]", "id"),
        ("error", "train.json[2]", "bbox[0]"),
        ("error", "train.json[2]", "image_path"),
        ("error", "train.json[3]", "image_path"),
        ("error", "train.json[4]", "answer"),
        ("warning", "train.json[4]", "image_path"),
        ("warning", "train.json[5]", "question"),
        ("note", "train.json[5]", "image_path"),
        ("error", "train.json[6]", "image_path"),
        ("error", "train.json[6]", "bbox[0]"),
        ("error", "train.json[6]", "bbox[1]"),
        ("error", "train.json[7]", "record"),
    }
    assert (report.items, report.records) == (8, 3)
    with pytest.raises(DataError, match=r"9 error\(s\) in 8 items") as caught:
        report.raise_if_errors()
    assert "train.json[7], record" in str(caught.value)
    text = printed(report)
    assert all(part in text for part in ("train.json[6]", "a.png, same.png", "none.png", "9 error(s)"))
    assert "and 11 more" in printed(report, max_rows=2)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("A. cyst\nwith fluid\nB. mass", "has a line break in the option A"),
        ("A. cyst\nB. mass\nof the left lung", "has a line break in the option B"),
        ("A. cyst\nB. mass\nB. none", "has the letter B twice"),
        ("A. cyst\nB. Cyst", "has the same text for the options A and B"),
        ("A. cyst\nB. mass\nOr is it?\nA. cyst\nB. mass", "has two lists of options"),
    ],
)
def test_options_that_are_doubtful_are_refused_by_name(tmp_path, options, problem):
    add(tmp_path, "a.png", noise(0, (40, 30)))
    file = write(tmp_path, [item("a.png"), item("a.png", question=f"<image>What?\n{options}")])
    (found,) = check_dataset(file).problems
    assert (found.severity, found.sample, found.field, found.problem) == (
        "error",
        "train.json[1]",
        "question",
        problem,
    )
    with pytest.raises(DataError, match=r"train\.json\[1\], question: has"):
        check_dataset(file).raise_if_errors()


def test_an_instruction_behind_the_options_is_no_problem(tmp_path):
    add(tmp_path, "a.png", noise(0, (40, 30)))
    question = "<image>What?\nA. cyst\nB. mass\nAnswer with the option's letter from the given choices directly."
    assert check_dataset(write(tmp_path, [item("a.png", question=question)])).problems == ()


def test_what_reading_refuses_the_check_refuses(tmp_path):
    add(tmp_path, "a.png", noise(0))
    for bad in (item("a.png", bbox=[[0, 0, 0, 1]]), item("../a.png"), item("a.png", answer="Z"), [], {}):
        file = write(tmp_path, [item("a.png"), bad])
        with pytest.raises(DataError) as read:
            read_records(file)
        assert str(read.value) == str(check_dataset(file).of("error")[0])


def test_warnings_do_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "HUGE_PIXELS", 100)
    add(tmp_path, "a.png", noise(0))
    report = check_dataset(write(tmp_path, [item("a.png")]))
    assert [p.severity for p in report.problems] == ["warning"]
    assert "24 x 16" in report.problems[0].problem
    report.raise_if_errors()


def test_an_image_of_many_questions_is_decoded_once(tmp_path, monkeypatch):
    add(tmp_path, "a.png", noise(0))
    decoded = []
    load = looks.load_image_facts
    monkeypatch.setattr(looks, "load_image_facts", lambda path: decoded.append(path) or load(path))
    check_dataset(write(tmp_path, [item("a.png")] * 20))
    assert len(decoded) == 1


def test_ctrl_c_does_not_wait_for_the_other_images(tmp_path, monkeypatch):
    for index in range(50):
        add(tmp_path, f"{index}.png", noise(index, (4, 4)))
    decoded = []

    def slow(path):
        decoded.append(path)
        time.sleep(0.02)
        return load(path)

    def interrupt(done, total):
        raise KeyboardInterrupt

    load = looks.load_image_facts
    monkeypatch.setattr(looks, "load_image_facts", slow)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(write(tmp_path, [item(f"{index}.png") for index in range(50)]), progress=interrupt)
    assert len(decoded) < 25


def test_a_folder_is_checked_with_all_its_splits(tmp_path):
    add(tmp_path, "a.png", noise(0))
    add(tmp_path, "b.png", noise(1))
    write(tmp_path, [item("a.png")])
    write(tmp_path, [item("b.png", answer="Q")], "test.json")
    report = check_dataset(tmp_path)
    assert report.items == 2
    assert found(report) == {("error", "test.json[0]", "answer")}


def test_markup_and_escapes_from_data_are_printed_as_they_are(tmp_path):
    add(tmp_path, "a.png", noise(0))
    text = printed(check_dataset(write(tmp_path, [item("a.png", answer="[red]\x1b[2J")])))
    assert "[red]" in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize(
    ("name", "images", "items", "share"),
    [("blood_cells", 328, 1016, 0.083), ("brain_tumor_mri", 570, 1389, 0.018), ("nuclei", 450, 812, 0.040)],
)
def test_real_sets_are_clean(name, images, items, share):
    """Figures of the sets' READMEs."""
    if not (REAL / name).is_dir():
        pytest.skip(f"the set {name} is not next to the repository")
    report = check_dataset(REAL / name)
    assert report.problems == ()
    assert (report.images, report.records) == (images, items)
    assert report.evidence_share == pytest.approx(share, abs=0.0005)
