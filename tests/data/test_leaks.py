"""Images and questions in two splits, found by content whatever the files are called."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from vitos.core.record import Record
from vitos.data.check import check_dataset, check_datasets
from vitos.data.leaks import Use, find_leaks
from vitos.data.looks import look_at, near_copies
from vitos.data.phantom import render, samples

QUESTION = "<image>What?\nA. cyst\nB. nodule"


def picture(seed, size=(96, 72)):
    """A soft pattern, unlike all others."""
    values = gaussian_filter(np.random.default_rng(seed).normal(size=(size[1], size[0], 3)), (4, 4, 0))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) / (high - low) * 255).astype(np.uint8))


def save(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def item(image, answer="A", question=QUESTION, **more):
    return {"image_path": [image] if isinstance(image, str) else image, "question": question, "answer": answer} | more


def write(folder, *items, name="train.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(items))
    return folder / name


def shared(reports):
    """What two items share; what is said about one alone is not looked at here."""
    alone = ("no options", "colour mode")
    return [p for report in reports for p in report.problems if not any(text in p.problem for text in alone)]


def told(reports):
    return [(p.severity, p.sample, p.field) for p in shared(reports)]


def problems(reports):
    return [p.problem for p in shared(reports)]


@pytest.fixture
def sets(tmp_path):
    """A train and a test folder with four different pictures each."""
    for number in range(8):
        save(tmp_path / ("train" if number < 4 else "test"), f"{number}.png", picture(number))
    train = [item(f"{number}.png", question=f"{QUESTION} {number}") for number in range(4)]
    test = [item(f"{number}.png", question=f"{QUESTION} {number}") for number in range(4, 8)]
    return tmp_path, train, test


def check(sets, train=(), test=()):
    folder, base_train, base_test = sets
    files = [write(folder / "train", *base_train, *train), write(folder / "test", *base_test, *test, name="test.json")]
    return check_datasets(files)


# --- images ---------------------------------------------------------------------------------------------------------


def test_sets_that_share_nothing(sets):
    reports = check(sets)
    assert told(reports) == []
    assert [report.records for report in reports] == [4, 4]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_one_picture_in_two_files_of_any_format(sets, suffix):
    """Other bytes, another name, another folder: the pixels are the same."""
    save(sets[0] / "test", f"copy.{suffix}", picture(2), lossless=True)
    reports = check(sets, test=[item(f"copy.{suffix}", question="Where?")])
    assert told(reports) == [("warning", "test.json[4]", "image_path")]
    (problem,) = problems(reports)
    assert problem.startswith("1 image(s) of test.json are also in train.json: ")
    assert f"copy.{suffix} (test.json[4]) and 2.png (train.json[2])" in problem


def test_a_turned_picture_is_its_upright_self(sets):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(sets[0] / "test", "copy.png", picture(1).rotate(180), exif=exif)
    assert ("warning", "test.json[4]", "image_path") in told(check(sets, test=[item("copy.png", question="Where?")]))


def test_one_file_for_both_splits(tmp_path):
    """The usual layout: one folder of images, two record files that name some of them twice."""
    for number in range(6):
        save(tmp_path, f"images/{number}.png", picture(number))
    items = [item(f"images/{number}.png", question=f"{QUESTION} {number}") for number in range(6)]
    write(tmp_path, *items[:4])
    other = [item(f"images/{number}.png", question=f"Where? {number}") for number in range(2, 6)]
    write(tmp_path, *other, name="test.json")
    expected = [
        ("warning", "train.json[2]", "image_path")
    ]  # files of a folder are checked in the order of their names
    report = check_dataset(tmp_path)
    assert told([report]) == expected
    assert problems([report])[0].startswith("2 image(s) of train.json are also in test.json")
    assert told(check_datasets([tmp_path / "test.json", tmp_path / "train.json"])) == expected


def test_many_questions_about_one_image_of_one_split_are_no_leak(sets):
    assert told(check(sets, train=[item("0.png", question=f"{n}? {QUESTION}") for n in range(5)])) == []


def test_crops_and_windows_of_one_picture_are_one_picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 50)).astype(np.uint16)
    for name in ("a", "b"):
        save(tmp_path, f"{name}.png", Image.fromarray(values))
    names = [("a.png#crop=0,0,0.5,1", "b.png#crop=0.5,0,1,1"), ("a.png#window=100,50", "b.png#window=3000,90")]
    names += [("a.png", "b.png#window=2000,90&crop=0,0,0.5,0.5")]
    for one, other in names:
        files = [write(tmp_path, item(one)), write(tmp_path, item(other, question="Where?"), name="test.json")]
        assert told(check_datasets(files)) == [("warning", "test.json[0]", "image_path")], (one, other)


def test_slices_of_one_volume_are_a_note(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="the nifti extra is not installed")
    values = np.random.default_rng(0).normal(size=(30, 32, 4))
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    names = ["a.nii#axis=2&slice=0", "a.nii#axis=2&slice=1", "a.nii#axis=2&slice=1&window=0,1"]
    train = write(tmp_path, item(names[0], question="1?"), item(names[1], question="2?"))
    reports = check_datasets([train, write(tmp_path, item("a.nii#axis=2&slice=3"), name="test.json")])
    assert told(reports) == [("note", "test.json[0]", "image_path")]
    assert "other slices or frames of files in train.json" in problems(reports)[0]
    reports = check_datasets([train, write(tmp_path, item(names[2]), name="test.json")])
    assert told(reports) == [("warning", "test.json[0]", "image_path")]


def test_images_of_records_that_do_not_stand_count(sets):
    save(sets[0] / "test", "copy.png", picture(0))
    reports = check(sets, test=[item("copy.png", answer="Q", question="Where?\nA. here\nB. there")])
    assert ("warning", "test.json[4]", "image_path") in told(reports)


def test_three_files_are_compared_in_pairs(sets):
    folder = sets[0]
    save(folder / "val", "x.png", picture(0))
    save(folder / "val", "y.png", picture(4))
    val = write(folder / "val", item("x.png", question="1?"), item("y.png", question="2?"), name="val.json")
    check(sets)
    reports = check_datasets([folder / "train", folder / "test", val])
    assert told(reports) == [("warning", "val.json[0]", "image_path"), ("warning", "val.json[1]", "image_path")]


def test_splits_of_several_files(sets):
    """Training files may share images with each other; the evaluation may not."""
    folder, train, test = sets
    save(folder / "more", "x.png", picture(0))
    files = [write(folder / "train", *train), write(folder / "more", item("x.png", question="1?"), name="more.json")]
    last = write(folder / "test", *test, name="test.json")
    assert told(check_datasets([*files, last], splits=["train", "train", "eval"])) == []
    save(folder / "test", "x.png", picture(0))
    last = write(folder / "test", *test, item("x.png", question="2?"), name="test.json")
    reports = check_datasets([*files, last], splits=["train", "train", "eval"])
    assert told(reports) == [("warning", "test.json[4]", "image_path")]
    assert problems(reports)[0].startswith("1 image(s) of eval are also in train: x.png (test.json[4]) and 0.png")


def test_one_file_as_train_and_eval(sets):
    folder, train, _ = sets
    file = write(folder / "train", *train)
    reports = check_datasets([file, file], splits=["train", "eval"])
    assert problems(reports)[0].startswith("4 image(s) of eval are also in train")
    assert len(reports[1].of("warning")) == 5
    assert reports[0].problems == ()


def test_files_of_one_name_are_told_apart(sets):
    folder, train, test = sets
    files = [write(folder / "train", *train), write(folder / "test", *test)]
    save(folder / "test", "x.png", picture(0))
    files[1] = write(folder / "test", *test, item("x.png", question="2?"))
    (problem,) = shared(check_datasets(files))
    assert problem.sample == f"{folder / 'test' / 'train.json'}[4]"
    assert str(folder / "train" / "train.json") in problem.problem


# --- copies ---------------------------------------------------------------------------------------------------------


def encoded(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return Image.open(out)


CHANGES = {
    "quality 40": lambda image: encoded(image, quality=40),
    "half the size": lambda image: image.resize((48, 36)),
    "twice the size": lambda image: image.resize((192, 144), Image.Resampling.BICUBIC),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "gray": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_a_note(sets, change):
    save(sets[0] / "test", "copy.png", CHANGES[change](picture(3)))
    reports = check(sets, test=[item("copy.png", question="Where?")])
    assert told(reports) == [("note", "test.json[4]", "image_path")]
    assert "copy.png (test.json[4]) and 3.png (train.json[3])" in problems(reports)[0]


def test_a_copy_stands_out_among_pictures_that_are_nothing_alike(tmp_path):
    """Noise, of which an encoder leaves less than of a picture."""
    looks = {}, {}
    for number in range(6):
        noise = Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        save(tmp_path, "a.png", noise)
        save(tmp_path, "b.jpg", noise.resize((32, 32), Image.Resampling.BICUBIC) if number % 2 else noise, quality=75)
        looks[0][f"a{number}"], looks[1][f"b{number}"] = look_at(tmp_path / "a.png"), look_at(tmp_path / "b.jpg")
    assert near_copies(looks[1], looks[0]) == [(f"b{number}", f"a{number}") for number in range(6)]
    assert near_copies({"b0": looks[1]["b0"]}, {f"a{n}": looks[0][f"a{n}"] for n in range(1, 6)}) == []


def test_a_copy_among_two_pictures_is_found(tmp_path):
    """There is no mean to take away yet."""
    save(tmp_path, "a.png", picture(0))
    save(tmp_path, "b.jpg", picture(0), quality=40)
    files = [write(tmp_path, item("a.png")), write(tmp_path, item("b.jpg", question="?"), name="test.json")]
    assert told(check_datasets(files)) == [("note", "test.json[0]", "image_path")]


def test_pictures_of_one_kind_are_no_copies(tmp_path):
    """Slices of one body plan, which agree to 0.95 before the common part is taken away."""
    looks = {"train": {}, "test": {}}
    for split, seen in looks.items():
        for index, (_, scene, _) in enumerate(samples(split, 60)):
            render(scene, 64).save(tmp_path / "a.png")
            seen[f"{split}{index}"] = look_at(tmp_path / "a.png")
    assert near_copies(looks["test"], looks["train"]) == []
    render(list(samples("train", 8))[7][1], 64).save(tmp_path / "a.jpg", quality=80)
    looks["test"]["copy"] = look_at(tmp_path / "a.jpg")
    assert near_copies(looks["test"], looks["train"]) == [("copy", "train7")]


def test_pictures_of_one_colour_are_no_copies(tmp_path):
    for number in range(3):
        save(tmp_path, f"{number}.png", Image.new("RGB", (20 + number, 20), (0, 90 * number, 0)))
    looks = {str(number): look_at(tmp_path / f"{number}.png") for number in range(3)}
    assert near_copies({"0": looks["0"]}, {name: looks[name] for name in "12"}) == []


# --- questions ------------------------------------------------------------------------------------------------------

SAME = [
    "<image>What?\nA. cyst\nB. nodule",
    "What?\nA. cyst\nB. nodule",
    "<image> What? \n A) cyst\n B) nodule",
    "<image>WHAT?\nA. Cyst\nB. Nodule",
    "<image>What?\n(A) cyst\n(B) nodule",
]


@pytest.mark.parametrize("question", SAME)
def test_a_question_twice(sets, question):
    reports = check(sets, train=[item("0.png", question=SAME[0]), item("0.png", question=question)])
    assert told(reports) == [("warning", "train.json[5]", "question")]
    assert problems(reports) == ["is the question of train.json[4] again"]
    save(sets[0] / "test", "copy.bmp", picture(0))
    reports = check(sets, train=[item("0.png", question=SAME[0])], test=[item("copy.bmp", question=question)])
    assert ("warning", "test.json[4]", "question") in told(reports)
    assert "is the question of train.json[4] in train.json again" in problems(reports)


@pytest.mark.parametrize("question", SAME)
def test_a_question_with_two_answers(sets, question):
    items = [item("0.png", question=SAME[0]), item("0.png", "B", question=question)]
    reports = check(sets, train=items)
    assert told(reports) == [("warning", "train.json[5]", "answer")]
    assert problems(reports) == ["is the question of train.json[4], but its answer is 'nodule' and not 'cyst'"]


def test_letters_are_no_answers(sets):
    """Options in another order: the same letter is another answer, the other letter is the same one."""
    turned = "<image>What?\nA. nodule\nB. cyst"
    items = [item("0.png", question=SAME[0]), item("0.png", "B", question=turned), item("0.png", "A", question=turned)]
    assert told(check(sets, train=items)) == [
        ("warning", "train.json[5]", "question"),
        ("warning", "train.json[6]", "answer"),
    ]


def test_what_makes_another_question(sets):
    """Another picture, other options, other words, another part of the picture, a second picture."""
    items = [
        item("0.png", question=SAME[0]),
        item("1.png", "B", question=SAME[0]),
        item("0.png", "B", question="<image>What?\nA. cyst\nB. mass"),
        item("0.png", "B", question="<image>Where?\nA. cyst\nB. nodule"),
        item("0.png#crop=0,0,0.5,1", "B", question=SAME[0]),
        item(["0.png", "1.png"], "B", question="<image><image>What?\nA. cyst\nB. nodule"),
    ]
    assert told(check(sets, train=items)) == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from("AB")), max_size=8))
@settings(max_examples=50, deadline=None)
def test_repeated_questions_against_brute_force(tmp_path_factory, drawn):
    """Every item that has a twin before it is told once, whether the answer is the twin's or not."""
    folder = tmp_path_factory.mktemp("set")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        save(folder, path.name, picture(number, (24, 18)))
    looks = {path: look_at(path) for path in paths}
    uses = []
    for number, (image, wording, answer) in enumerate(drawn):
        question = f"{QUESTION} {'ab'[wording]}"
        record = Record(str(number), (paths[image],), question, answer)
        uses.append(Use(source=0, split="s", sample=str(number), images=(paths[image],), record=record))
    found = {(p.sample, p.field) for _, p in find_leaks(uses, looks)}
    expected = set()
    for number, (image, wording, answer) in enumerate(drawn):
        first = next((a for i, w, a in drawn[:number] if (i, w) == (image, wording)), None)
        if first is not None:
            expected.add((str(number), "question" if first == answer else "answer"))
    assert found == expected
