"""Record files: what is read, and every way in which a record is refused."""

import json
import os
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitos.core.geometry import Box
from vitos.data.images import DataError, load_image_facts
from vitos.data.readers import iter_entries, parse_entry, read_records

REAL = Path(__file__).parents[3] / "shared" / "data"
QUESTION = "<image>What is it?\nA. cyst\nB. nodule"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def item(**changes):
    record = {"image_path": ["images/a.png"], "question": QUESTION, "answer": "A", "bbox": [[0.1, 0.2, 0.3, 0.4]]}
    return {name: value for name, value in (record | changes).items() if value is not ...}


def write(folder, *items, name="train.json"):
    lines = "\n\n".join(json.dumps(i) for i in items)
    (folder / name).write_text(lines if name.endswith("l") else json.dumps(items), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_fields(folder, name):
    file = write(folder, item(), item(id="x", answer="B", image_path="images/b.png", meta={"site": "µ"}), name=name)
    first, second = read_records(file)
    assert (first.id, first.image_paths) == ("train/0", ((folder / "images/a.png").resolve(),))
    assert (first.question, first.answer, first.boxes) == (QUESTION, "A", (Box(0.1, 0.2, 0.3, 0.4),))
    assert (second.id, second.answer, second.meta) == ("x", "B", {"site": "µ"})
    assert second.image_paths == ((folder / "images/b.png").resolve(),)


def test_a_selector_stays_behind_the_path(folder):
    (record,) = read_records(write(folder, item(image_path="images/a.png#window=40,400")))
    assert record.image_paths == (Path(f"{(folder / 'images/a.png').resolve()}#window=40,400"),)


@pytest.mark.parametrize("bbox", [..., None, []])
def test_no_boxes_are_none(folder, bbox):
    assert read_records(write(folder, item(bbox=bbox)))[0].boxes is None


def test_placeholder_is_added_for_a_single_image_only(folder):
    assert read_records(write(folder, item(question="What?")))[0].question == "<image>What?"
    two = item(image_path=["images/a.png", "images/b.png"], question="<image>and<image>?")
    assert len(read_records(write(folder, two))[0].image_paths) == 2
    with pytest.raises(DataError, match=r"train.json\[0\], question: has 1 <image> for 2 image"):
        read_records(write(folder, two | {"question": QUESTION}))


BAD = [
    ("image_path", ..., "missing"),
    ("image_path", [], "not a path"),
    ("image_path", 3, "not a path"),
    ("image_path", ["images/none.png"], "no file"),
    ("image_path", ["images"], "is a folder"),
    ("image_path", ["x" * 5000], "cannot be read"),
    ("image_path", ["../a.png"], "no path below"),
    ("image_path", ["../a.png#window=1,2"], "no path below"),
    ("image_path", ["images/none.dcm#frame=1"], "no file"),
    ("image_path", ["images/a.png#frame=0"], "frame=0 is no whole number from 1"),
    ("image_path", ["images/a.png#frames=1"], "'frames' selects nothing"),
    ("image_path", "http://example.org/a.png", "no path below"),
    ("question", ..., "missing"),
    ("question", "<image> ", "not a question"),
    ("question", 5, "not a question"),
    ("question", "<image><image>What?", "2 <image> for 1"),
    ("answer", ..., "missing"),
    ("answer", "cyst", "not a letter"),
    ("answer", "b", "not a letter"),
    ("answer", "", "not a letter"),
    ("answer", "É", "not a letter"),
    ("answer", None, "not a letter"),
    ("answer", "C", "none of the options A, B"),
    ("bbox", "0.1", "not a list of boxes"),
    ("bbox", [0.1, 0.2, 0.3, 0.4], "one bare box"),
    ("bbox", [[0.1, 0.2, 0.3]], "not four numbers"),
    ("bbox", [[0.1, 0.2, 0.3, "0.4"]], "not four numbers"),
    ("bbox", [[False, 0, True, True]], "not four numbers"),
    ("bbox", [[0.3, 0.2, 0.1, 0.4]], "x1 < x2"),
    ("bbox", [[0.1, 0.2, 0.1, 0.4]], "x1 < x2"),
    ("bbox", [[0.1, 0.2, 1.0005, 0.4]], "0..1"),
    ("bbox", [[-0.0001, 0.2, 1, 0.4]], "0..1"),
    ("bbox", [[10, 20, 300, 400]], "divided by"),
    ("bbox", [[0.1, 0.2, float("nan"), 0.4]], "finite"),
    ("bbox", [[0, 0, 10**400, 1]], "too large"),
    ("bbox", [[0, 0, 1.00002, 1]], "0..1"),
    ("bbox", [[1.0000001, 0, 1.0000002, 1]], "x1 < x2"),
    ("question", "Is it a nodule \ud83d?\nA. yes\nB. no", r"half a character \(\\ud83d\)"),
    ("question", "What?\nA. yes\nB. no \ude00", r"half a character \(\\ude00\)"),
    ("image_path", ["images/\ud83d.png"], "half a character"),
    ("image_path", "images/\udce9.png", "half a character"),
    ("id", "x\ud83d", "not a printable"),
    ("meta", {"thought": "a mass \ud83d"}, "half a character"),
    ("meta", {"\ud83d": "a mass"}, "half a character"),
    ("template", "\ud83d", "half a character"),
    ("answer", "\ud83d", "not a letter"),
    ("kind", "texts", "is 'texts'; write one of letter, word, number, list, text"),
    ("kind", ["text"], "write one of letter"),
    ("kind", "number", "is no number with a known unit: '[AB]'"),
    ("tolerance", "1 mm", "not a letter|only numbers have one"),
    ("tolerance", [1], "not a text or a number"),
    ("accepted", "cyst", "not a list of answers"),
    ("accepted", ["A"], "one option is right"),
    ("id", 7, "not a printable"),
    ("id", "\x1b[31m", "not a printable"),
    ("meta", {"n": 1}, "not an object of texts"),
    ("meta", "x", "not an object of texts"),
    ("template", 1, "not a text"),
    ("boxes", [], "no field of a record"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_a_bad_field_is_named(folder, field, value, message):
    file = write(folder, item(), item(**{field: value}))
    with pytest.raises(DataError, match="(?s)" + message) as caught:
        read_records(file)
    assert str(caught.value).startswith("train.json[1], ")
    assert field in str(caught.value)
    assert read_records(file, limit=1)  # the sound one before it


def test_box_edges_that_rounding_puts_outside_are_on_the_edge(folder):
    """Centre and half width in float32, fractions of six decimals, and a tiny negative."""
    width = np.float32(0.3) + np.float32(0.7000001)
    boxes = [[0.5, 0.5, 1.0000001, 1.000005], [-1e-9, -0.0, 0.5, float(width)], [0, 0, 1, 1]]
    (record,) = read_records(write(folder, item(bbox=boxes)))
    assert record.boxes == (Box(0.5, 0.5, 1, 1), Box(0, 0, 0.5, 1), Box(0, 0, 1, 1))
    (record,) = read_records(write(folder, item(image_path="images/a.png#crop=-1e-9,0,1.0000001,1")))
    assert load_image_facts(record.image_paths[0])[1].rendering.crop == (0, 0, 1, 1)


@pytest.mark.parametrize("text", ["an emoji 😀", "\u200d joined", "NUL \0", "\ufffd"])
def test_whole_characters_of_any_kind_are_text(folder, text):
    question = f"{QUESTION}{text}"
    (record,) = read_records(write(folder, item(question=question, meta={"thought": text})))
    assert (record.question, record.meta["thought"]) == (question, text)


def test_the_template_of_a_meta_json_is_text_as_well(folder):
    write(folder, item())
    (folder / "meta.json").write_text(json.dumps([{"split": "train", "index": 0, "template": "\ud83d"}]))
    with pytest.raises(DataError, match=r"train.json\[0\], template: holds half a character"):
        read_records(folder)


def test_a_path_that_is_no_utf_8_is_refused_before_a_run_ends_with_it(folder):
    try:
        named = folder / os.fsdecode(b"caf\xe9")
        named.mkdir()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system allows no such name")
    (folder / "images").rename(named / "images")
    with pytest.raises(DataError, match="no UTF-8"):
        read_records(write(named, item()))


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_names_of_images_splits_and_templates_in_either_spelling(folder, stored, asked):
    (folder / "images/a.png").rename(folder / "images" / normalize(stored, "ä.png"))
    file = write(folder, item(image_path=normalize(asked, "images/ä.png")), name=normalize(stored, "prüfung.json"))
    templates = [{"split": normalize(asked, "prüfung"), "index": 0, "template": "t"}]
    (folder / "meta.json").write_text(json.dumps(templates))
    (record,) = read_records(folder, split=normalize(asked, "prüfung"))
    assert record.image_paths[0].is_file()
    assert record.meta == {"template": "t"}
    assert read_records(file)[0].image_paths == record.image_paths


def test_all_problems_of_an_item_are_collected(folder):
    raw = item(answer="x", bbox=[[0, 0, 2, 2], [0.5, 0, 0.4, 1], [0, 0, 1, 1]], question=..., extra=1)
    (entry,) = iter_entries(write(folder, raw))
    assert [p.field for p in entry.problems] == ["question", "'extra'", "answer", "bbox[0]", "bbox[1]"]
    assert entry.record is None
    assert len(entry.images) == 1


def test_duplicate_ids(folder):
    with pytest.raises(DataError, match=r"train.json\[1\], id: 'a' is also the id of train.json\[0\]"):
        read_records(write(folder, item(id="a"), item(id="a")))
    with pytest.raises(DataError, match="also the id"):  # a default id that another took
        read_records(write(folder, item(id="train/1"), item()))


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "is not JSON"),
        (b"", "is not JSON"),
        (b"{}", "not an array"),
        (b"[]", "no records"),
        (b"[1]", "not an object"),
        (b"\xff\xfe[", "UTF-8"),
        (b"[" * 200_000, "is not JSON"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    ],
)
def test_unreadable_files(folder, content, message):
    (folder / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=f"train.json.*{message}"):
        read_records(folder / "train.json")


def test_jsonl_names_the_line_and_goes_on(folder):
    file = write(folder, item(), item(), name="train.jsonl")
    file.write_text("{\n" + file.read_text())
    entries = list(iter_entries(file))
    assert entries[0].problems[0].field == "line 1"
    assert [e.record.id for e in entries[1:]] == ["train/1", "train/2"]


def test_line_separators_inside_a_text_do_not_split_a_jsonl_line(folder):
    raw = json.dumps(item(question=QUESTION + "\u2028\x85"), ensure_ascii=False)
    (folder / "train.jsonl").write_text(raw, encoding="utf-8")
    assert len(read_records(folder / "train.jsonl")) == 1


def test_byte_order_mark(folder):
    file = write(folder, item())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_records(file)) == 1


def test_folder_and_split(folder):
    write(folder, item())
    assert read_records(folder)[0].id == "train/0"
    write(folder, item(), item(), name="test.jsonl")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read_records(folder)
    assert len(read_records(folder, split="test")) == 2
    with pytest.raises(DataError, match=r"no val.json .*test.jsonl, train.json"):
        read_records(folder, split="val")
    with pytest.raises(DataError, match="no such file or folder"):
        read_records(folder / "nothing")


def test_limit(folder):
    file = write(folder, item(), item(), item(answer="x"))
    assert len(read_records(file, limit=2)) == 2
    with pytest.raises(ValueError, match="limit"):
        read_records(file, limit=0)


@pytest.mark.parametrize("source", ["hub:owner/set", "my data.parquet", "folder"])
def test_parquet_and_hub_name_the_command(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train-00000-of-00001.parquet").write_bytes(b"")
    expected = {
        "hub:owner/set": "vitos data convert hub:owner/set set-json --to json",
        "my data.parquet": "vitos data convert 'my data.parquet' 'my data-json' --to json",
        "folder": "vitos data convert folder folder-json --to json",
    }
    with pytest.raises(DataError) as caught:
        read_records(source)
    assert expected[source] in str(caught.value)


# Templates


def rows(*triples):
    return json.dumps([{"split": s, "index": i, "template": t, "numbers": []} for s, i, t in triples])


def test_templates_of_meta_json(folder):
    write(folder, item(), item(template="own"), item(meta={"template": "meta", "site": "x"}), item())
    (folder / "meta.json").write_text(rows(("test", 3, "no"), *[("train", i, f"t{i}") for i in range(3)]))
    metas = [r.meta for r in read_records(folder, split="train")]
    assert metas == [{"template": "t0"}, {"template": "own"}, {"template": "meta", "site": "x"}, {}]
    assert [r.meta for r in read_records(folder / "train.json", split="test")][3] == {"template": "no"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not an array"),
        ("[", "is not JSON"),
        ('[{"split": "train"}]', r"meta.json\[0\]"),
        (rows(("train", True, "t")), r"meta.json\[0\]"),
        (rows(("train", 0, "t"), ("train", 0, "u")), "second row"),
        (rows(("train", 2, "t")), "ends at 1"),
    ],
)
def test_meta_json_that_does_not_fit(folder, content, message):
    file = write(folder, item(), item())
    (folder / "meta.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_records(file)


def test_contradicting_templates(folder):
    with pytest.raises(DataError, match=r"meta\.template is 'b'"):
        read_records(write(folder, item(template="a", meta={"template": "b"})))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
FIELDS = ["image_path", "question", "answer", "bbox", "id", "meta", "template"]


@given(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_gives_a_record_or_problems(raw):
    entry = parse_entry(raw, sample="s", default_id="d", root=Path("/nowhere"), seen={})
    assert (entry.record is None) == bool(entry.problems)
    assert all(p.problem.isprintable() for p in entry.problems)


# The real sets


@pytest.mark.parametrize(
    ("name", "train", "test", "templates"),
    [  # counts of the sets' READMEs, train templates in alphabetical order
        ("blood_cells", 837, 179, [363, 78, 260, 136]),
        ("brain_tumor_mri", 1099, 290, [240, 112, 297, 450]),
        ("nuclei", 636, 176, [128, 80, 168, 260]),
    ],
)
def test_real_sets(name, train, test, templates):
    if not (REAL / name).is_dir():
        pytest.skip(f"the set {name} is not next to the repository")
    records = read_records(REAL / name, split="train")
    assert (len(records), len(read_records(REAL / name, split="test"))) == (train, test)
    counts = Counter(record.meta["template"] for record in records)
    assert [counts[template] for template in sorted(counts)] == templates
    assert all(record.answer in record.options and record.boxes for record in records)


# --- answers in words -----------------------------------------------------------------------------------------------


def opened(answer, kind, **fields):
    return item(question="What is shown?", answer=answer, kind=kind, **fields)


def test_answers_of_every_kind_are_read(folder):
    rows = [
        opened("Left lung.", "word"),
        opened(12, "number", tolerance=0.5),
        opened("1.2 cm", "number", tolerance="10 %", accepted=["0.5 inch"]),
        opened(["effusion", "nausea and vomiting"], "list", accepted=["effusion; emesis", ["effusion"]]),
        opened("a small mass", "text", accepted=["a nodule"]),
    ]
    read = read_records(write(folder, *rows))
    assert [(r.kind, r.answer, r.accepted, r.tolerance) for r in read] == [
        ("word", "Left lung.", (), ""),
        ("number", "12", (), "0.5"),
        ("number", "1.2 cm", ("0.5 inch",), "10 %"),
        ("list", "effusion; nausea and vomiting", ("effusion; emesis", "effusion"), ""),
        ("text", "a small mass", ("a nodule",), ""),
    ]
    assert all(record.options == {} for record in read)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (opened("5 bananas", "number"), "no number with a known unit: '5 bananas'"),
        (opened("5 mm", "number", tolerance="1 kg"), "cannot be compared with '5 mm'"),
        (opened("5 mm", "number", accepted=["five or six"]), r"accepted\[0\]: is no number"),
        (opened("5 mm", "text", tolerance="1 mm"), "only numbers have one"),
        (opened(" ", "text"), "is blank"),
        (opened(5, "text"), "is 5, not a text"),
        (opened([], "list"), "not a text"),
        (opened(["a; b"], "list"), "not a text"),
        (opened(" ; ", "list"), "names no finding"),
        (opened(True, "number"), "is True, not a text"),
        (opened(float("nan"), "number"), "no number with a known unit"),
        (opened("mass \ud83d", "text"), "half a character"),
    ],
)
def test_a_bad_answer_in_words_is_named(folder, row, message):
    with pytest.raises(DataError, match=message):
        read_records(write(folder, row))
